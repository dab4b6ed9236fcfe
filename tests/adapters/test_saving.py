"""A save that fails or is killed leaves the previous adapter; one that ends leaves the new one, whole."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft.peft_model
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pica import PicaConfig, save_adapter, save_whole
from pica.errors import AdapterFileError, ConfigError, OutputError
from pica.files import folders
from pica.tuners.base.bank import MatrixBank

KILLED = 9


def make_base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).eval()


def adapted(value: float) -> PeftModel:
    model = get_peft_model(make_base(), PicaConfig(r=3, target_modules=["0", "2"]))  # pyright: ignore[reportArgumentType]
    assert isinstance(model, PeftModel)
    fill(model, value)
    return model


def fill(model: PeftModel, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)


def loaded_value(folder: Path) -> float:
    """The value that the saved adapter's matrices are filled with; it loads, and all of it is of one save."""
    model = PeftModel.from_pretrained(make_base(), folder)
    values = {float(v) for n, p in model.named_parameters() if "pica_M" in n for v in p.unique()}
    assert len(values) == 1
    return values.pop()


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def in_a_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked process; its exit status, 0 where it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(77)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at(step: int, exchange: bool, action: Callable[[], object]) -> int:
    """Run `action` in a child that dies at its `step`-th change of the file system (or flush), before it is made."""

    def child() -> None:
        count = 0

        def tick() -> None:
            nonlocal count
            count += 1
            if count > step:
                os._exit(KILLED)

        def watch(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate"):
                tick()

        def in_two_steps(tensors: dict[str, Tensor], path: str, metadata: dict[str, str] | None = None) -> None:
            tick()
            save_file(tensors, path, metadata)
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            tick()
            Path(path).write_bytes(whole)

        flush, swap = os.fsync, folders._exchange

        def fsync(handle: int) -> None:
            tick()
            flush(handle)

        def exchange_names(one: Path, other: Path) -> bool:
            tick()
            done = exchange and swap(one, other)
            tick()
            return done

        sys.addaudithook(watch)
        peft.peft_model.safe_save_file = in_two_steps  # pyright: ignore[reportPrivateImportUsage]
        os.fsync, folders._exchange = fsync, exchange_names
        action()

    return in_a_child(child)


def test_a_save_that_is_killed_at_any_step_leaves_an_adapter(tmp_path: Path):
    target = tmp_path / "adapter"
    old, new = adapted(1.0), adapted(2.0)
    seen = []
    for step in range(500):
        save_adapter(old, target)
        (target / "tokenizer.json").write_text("kept")
        status = killed_at(step, True, lambda: save_adapter(new, target))
        seen.append(loaded_value(target))
        assert (target / "tokenizer.json").read_text() == "kept"
        if status == 0:
            break
        assert status == KILLED
    assert status == 0
    assert len(seen) > 15
    assert seen == sorted(seen)  # 1, 1, ..., 2: until the names are swapped the old one, from then on the new one
    assert set(seen) == {1.0, 2.0}


def test_without_an_exchange_of_names_a_kill_loses_nothing(tmp_path: Path):
    """Where the system cannot swap names, the old adapter may stand under another name; one of them is always there."""
    old, new, home = adapted(1.0), adapted(2.0), tmp_path
    for step in range(500):
        home = tmp_path / str(step)
        save_adapter(old, home / "adapter")
        status = killed_at(step, False, lambda home=home: save_adapter(new, home / "adapter"))
        if (home / "adapter").exists():
            assert loaded_value(home / "adapter") in (1.0, 2.0)
        else:
            (kept,) = home.glob(".adapter.*.old")
            assert loaded_value(kept) == 1.0
        if status == 0:
            break
    assert loaded_value(home / "adapter") == 2.0
    assert everything_in(home)[0] == "adapter"


def test_sigkill_at_any_moment_leaves_an_adapter(tmp_path: Path):
    target = tmp_path / "adapter"
    model = adapted(1.0)
    save_adapter(model, target)
    for turn in range(8):
        child = os.fork()
        if child == 0:
            while True:
                fill(model, float(turn + 2))
                save_adapter(model, target)
        time.sleep(0.05 + 0.013 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert loaded_value(target) in range(1, turn + 3)


@pytest.mark.parametrize("where", ["weights", "flush", "names"])
def test_a_full_disk_leaves_the_previous_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    target = tmp_path / "adapter"
    save_adapter(adapted(1.0), target)
    before = everything_in(tmp_path)

    def refuse(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "weights":
        monkeypatch.setattr(peft.peft_model, "safe_save_file", refuse)
    elif where == "flush":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        monkeypatch.setattr(folders, "_exchange", refuse)
    with pytest.raises(OutputError, match=r"No room left to write .*adapter'; free some space"):
        save_adapter(adapted(2.0), target)
    assert everything_in(tmp_path) == before
    assert loaded_value(target) == 1.0


@pytest.mark.parametrize("change", ["value", "shape", "missing", "cut"])
def test_what_the_disk_gives_back_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    target = tmp_path / "adapter"
    save_adapter(adapted(1.0), target)

    def damaged(tensors: dict[str, Tensor], path: str, metadata: dict[str, str] | None = None) -> None:
        changed = dict(tensors)
        name = next(name for name in changed if name.endswith("-8"))
        if change == "value":
            changed[name] = changed[name] * torch.nan
        elif change == "shape":
            changed[name] = changed[name][:-1]
        elif change == "missing":
            del changed[name]
        save_file(changed, path, metadata)
        if change == "cut":
            os.truncate(path, 300)

    monkeypatch.setattr(peft.peft_model, "safe_save_file", damaged)
    with pytest.raises(OutputError, match="What was written for .*adapter' cannot be used"):
        save_adapter(adapted(2.0), target)
    assert loaded_value(target) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_that_is_not_finite_is_not_written(tmp_path: Path):
    save_adapter(adapted(1.0), tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="holds NaN or infinity, so nothing was written"):
        save_adapter(adapted(float("nan")), tmp_path / "adapter")
    assert loaded_value(tmp_path / "adapter") == 1.0


def test_any_adapter_by_name_goes_into_the_folder_itself(tmp_path: Path):
    model = adapted(1.0)
    model.add_adapter("second", PicaConfig(r=2, target_modules=["0"], init_weights=False))
    save_adapter(model, tmp_path / "out", "second")
    assert everything_in(tmp_path / "out") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert PicaConfig.from_pretrained(tmp_path / "out").r == 2
    with pytest.raises(ConfigError, match=r"no adapter 'third'; it has default, second"):
        save_adapter(model, tmp_path / "out", "third")


def test_it_writes_what_peft_writes_and_takes_other_methods_too(tmp_path: Path):
    model = get_peft_model(make_base(), LoraConfig(r=2, target_modules=["0"]))  # pyright: ignore[reportArgumentType]
    assert isinstance(model, PeftModel)
    for made in (model, adapted(1.0)):
        save_adapter(made, tmp_path / "ours")
        made.save_pretrained(str(tmp_path / "pefts"))
        ours, pefts = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "pefts"))
        assert ours.keys() == pefts.keys()
        assert all(torch.equal(ours[name], pefts[name]) for name in ours)
        assert everything_in(tmp_path / "ours") == everything_in(tmp_path / "pefts")


def test_other_folders_are_left_alone_and_old_leftovers_removed(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")
    with pytest.raises(OutputError, match="holds something else than an adapter"):
        save_adapter(adapted(1.0), tmp_path / "thesis")
    for name, age in ((".adapter.1.partial", 7200), (".adapter.2.partial", 60), (".other.1.partial", 7200)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    save_adapter(adapted(1.0), tmp_path / "adapter")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".adapter.2.partial", ".other.1.partial", "adapter", "thesis"]


# ---- saves by Trainer and push_to_hub --------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_killed_at(model: PeftModel, folder: Path, moment: int) -> bool:
    """Save in a child that is killed at its `moment`-th touch of the folder or what lies beside; whether it was."""
    child = os.fork()
    if child == 0:
        left = moment

        def count(event: str, args: tuple) -> None:
            nonlocal left
            if event.startswith(("open", "os.", "shutil.")) and any(str(folder.parent) in str(a) for a in args):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            model.save_pretrained(str(folder))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
@pytest.mark.parametrize("within", [False, True], ids=["a checkpoint's folder", "with checkpoints within"])
def test_a_killed_save_of_a_trainer_leaves_whole_files(tmp_path: Path, within: bool):
    folder = tmp_path / "there" / "out"
    old = get_peft_model(nn.Sequential(nn.Linear(6, 8)), PicaConfig(r=2, target_modules=["0"]))  # pyright: ignore[reportArgumentType]
    old.save_pretrained(str(folder))
    (folder / "optimizer.pt").write_bytes(b"others'")
    if within:
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "x").write_bytes(b"others'")
    before = files_of(folder)
    new = save_whole(get_peft_model(nn.Sequential(nn.Linear(6, 8)), PicaConfig(r=3, target_modules=["0"])))  # pyright: ignore[reportArgumentType]
    new.save_pretrained(str(tmp_path / "after"))
    after = {**before, **files_of(tmp_path / "after")}
    killed, moment = True, 0
    while killed:
        killed = save_killed_at(new, folder, moment)
        found = {name: data for name, data in files_of(folder).items() if ".partial" not in name}
        if within:
            assert all(data in (before[name], after[name]) for name, data in found.items()), moment
            assert found.keys() == before.keys(), moment
        else:
            assert found in (before, after), moment
        moment += 1
    assert found == after
    assert moment > 8


def test_a_model_that_saves_whole_is_copied_and_pickled_like_others(tmp_path: Path):
    model = save_whole(get_peft_model(nn.Sequential(nn.Linear(6, 8)), PicaConfig(r=2, target_modules=["0"])))  # pyright: ignore[reportArgumentType]
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for number, other in enumerate((model, copied, loaded)):
        other.save_pretrained(str(tmp_path / str(number)), True, ["default"])
    found = [files_of(tmp_path / str(number)) for number in range(3)]
    assert found[0] == found[1]
    found[2]["README.md"] = found[0]["README.md"]  # a pickled copy saves as PEFT does, its card included
    assert found[0] == found[2]
    assert copied.save_pretrained.__self__ is copied  # pyright: ignore[reportFunctionMemberAccess]


def test_a_model_that_was_pickled_when_the_bank_had_another_name_loads():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 8)), PicaConfig(r=2, target_modules=["0"], init_weights=False))  # pyright: ignore[reportArgumentType]
    now = MatrixBank.__qualname__
    try:
        MatrixBank.__qualname__ = "PicaBank"
        pickled = pickle.dumps(model)
    finally:
        MatrixBank.__qualname__ = now
    assert b"PicaBank" in pickled
    assert b"MatrixBank" not in pickled
    x = torch.ones(1, 6)
    assert torch.equal(pickle.loads(pickled)(x), model(x))
