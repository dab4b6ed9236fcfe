"""The analysis of pairs whose answer is known, its memory, its resuming, and the ranks that it suggests."""

import ctypes
import sys
import threading
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pica
from pica.errors import ConfigError, OutputError
from pica.experiments.analyze import analysis as engine
from pica.experiments.analyze.analysis import MEMORY_COPIES, PROGRESS, analyse
from pica.experiments.analyze.ranks import patterns, recipe_text, suggest
from pica.experiments.analyze.summary import curve, near_zero, summarise
from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.reporting import Silent
from pica.experiments.results.analysis import Settings
from pica.theory import spectrum
from pica.tuners.pica.layer import PicaLinear
from tests import processes
from tests.experiments.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


def variant(base: Path, folder: Path, change) -> Path:
    """A copy of the model whose linear layers went through `change(name, weight)`."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors = {n: change(n, t).contiguous() if t.ndim == 2 and "embed" not in n else t for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_column_space(rank: int):
    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        g = torch.Generator().manual_seed(sum(map(ord, name)))
        rows = spectrum(weight).inputs[:rank].float()
        return weight + 0.01 * torch.randn(weight.shape[0], rank, generator=g) @ rows

    return change


def noise(name: str, weight: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    return weight + 0.01 * torch.randn(weight.shape, generator=g)


def test_an_update_inside_the_column_space_is_found_there(base: Path, tmp_path: Path):
    tuned = variant(base, tmp_path / "tuned", in_column_space(5))
    found = analyse(Settings(str(base), str(tuned), rank=5), tmp_path / "out", reporter=Silent())
    assert len(found.layers) == 14
    for summary in summarise(found):
        assert summary.column == pytest.approx(1.0, abs=1e-4)
        assert summary.best == pytest.approx(1.0, abs=1e-4)
        assert summary.minor is not None
        assert summary.minor < 1e-3
        assert 0.05 < (summary.random or 0) < 0.35
    assert {r for r in suggest(found, 0.999).ranks.values() if r} == {5}


def test_noise_lies_nowhere_in_particular(base: Path, tmp_path: Path):
    tuned = variant(base, tmp_path / "tuned", noise)
    found = analyse(Settings(str(base), str(tuned), rank=8), tmp_path / "out", reporter=Silent())
    for summary in summarise(found):
        assert summary.column == pytest.approx(summary.chance, rel=0.25)
        assert summary.random == pytest.approx(summary.chance, rel=0.25)
        assert summary.row == pytest.approx(summary.row_chance, rel=0.25)
        assert (summary.residual_over_optimum or 0) > 1.2
    near, unrelated = near_zero(found)
    assert near > unrelated


def test_numbers_are_those_of_the_definition(base: Path, tmp_path: Path):
    tuned = variant(base, tmp_path / "tuned", noise)
    found = analyse(
        Settings(str(base), str(tuned), rank=3, only="layers.1.mlp.down"), tmp_path / "out", reporter=Silent()
    )
    (layer,) = found.layers
    name = "model.layers.1.mlp.down_proj.weight"
    before = load_file(base / "model.safetensors")[name].double()
    delta = load_file(tuned / "model.safetensors")[name].double() - before
    p = torch.linalg.svd(before)[2]
    total = float(delta.square().sum())
    assert layer.update is not None
    assert layer.update["energy"] == pytest.approx(total)
    column = [float((delta @ p[:r].T).square().sum()) / total for r in range(1, 33)]
    assert curve([layer], "column").tolist() == pytest.approx(column, rel=1e-4)
    left = torch.linalg.svd(before)[0].T
    row = float((left[:3] @ delta).square().sum()) / total
    assert float(curve([layer], "row")[2]) == pytest.approx(row, rel=1e-4)
    best = float(torch.linalg.svdvals(delta)[:3].square().sum()) / total
    assert float(curve([layer], "best")[2]) == pytest.approx(best, rel=1e-4)
    assert layer.update["theorem1"]["residual"] == pytest.approx(total * (1 - column[2]), rel=1e-6)


def test_a_pica_adapter_lies_wholly_in_the_column_space(base: Path, tmp_path: Path):
    config = pica.PicaConfig(r=6, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01
    model.save_pretrained(str(tmp_path / "adapter"))
    found = analyse(Settings(str(base), str(tmp_path / "adapter"), rank=6), tmp_path / "out", reporter=Silent())
    assert [len(layers) for layers in found.roles().values()] == [2, 2]
    assert all(summary.column == pytest.approx(1.0, abs=1e-5) for summary in summarise(found))
    assert "10 of 14 linear layers are not in" in found.notes[0]


def test_an_interrupted_analysis_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tuned = variant(base, tmp_path / "tuned", noise)
    settings = Settings(str(base), str(tuned), rank=4)
    measure, seen = engine._measure, []

    def stop_at_five(*given):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(given[2].path)
        return measure(*given)

    monkeypatch.setattr(engine, "_measure", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        analyse(settings, tmp_path / "out", reporter=Silent())
    with open(tmp_path / "out" / PROGRESS, "a") as file:
        file.write('{"path": "cut o')  # as a kill in the middle of a line leaves it
    again = []
    monkeypatch.setattr(engine, "_measure", lambda *given: again.append(given[2].path) or measure(*given))
    resumed = analyse(settings, tmp_path / "out", reporter=Silent())
    assert len(again) == 9
    assert not set(again) & set(seen)
    assert resumed.layers == analyse(settings, tmp_path / "whole", reporter=Silent()).layers
    with pytest.raises(OutputError, match=r"unfinished analysis .* this differs: rank \(4 then, 5 now\)\."):
        analyse(Settings(str(base), str(tuned), rank=5), tmp_path / "out", reporter=Silent())
    variant(base, tmp_path / "newer", in_column_space(3)).rename(tmp_path / "moved")
    (tmp_path / "tuned" / "model.safetensors").write_bytes((tmp_path / "moved" / "model.safetensors").read_bytes())
    with pytest.raises(OutputError, match="this differs: model.safetensors of the tuned model"):
        analyse(settings, tmp_path / "out", reporter=Silent())
    moved = Settings(str(base), str(tmp_path / "moved"), rank=4)
    with pytest.raises(OutputError, match="unfinished"):
        analyse(moved, tmp_path / "out", reporter=Silent())
    analyse(moved, tmp_path / "out", reporter=Silent(), replace=True)
    assert analyse(moved, tmp_path / "out", reporter=Silent()).layers != resumed.layers


def test_refusals(base: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="equals .* in every linear layer"):
        analyse(Settings(str(base), str(base)), tmp_path / "a", reporter=Silent())
    with pytest.raises(ConfigError, match="no linear layer that --only 'nothing' matches"):
        analyse(Settings(str(base), only="nothing"), tmp_path / "b", reporter=Silent())
    broken = variant(base, tmp_path / "nan", lambda name, weight: weight / 0 if "up_proj" in name else weight)
    with pytest.raises(Exception, match="up_proj: holds NaN or infinity"):
        analyse(Settings(str(base), str(broken)), tmp_path / "c", reporter=Silent())


def test_layers_that_did_not_change_count_in_no_average(base: Path, tmp_path: Path):
    tuned = variant(base, tmp_path / "tuned", lambda n, w: noise(n, w) if "layers.0" in n and "q_proj" in n else w)
    found = analyse(Settings(str(base), str(tuned), rank=4), tmp_path / "out", reporter=Silent())
    by_role = {summary.role: summary for summary in summarise(found)}
    assert by_role["model.layers.*.self_attn.q_proj"].layers == 1
    assert by_role["model.layers.*.self_attn.v_proj"].column is None
    assert found.notes == ["13 of 14 layers are unchanged; they count in no average."]
    assert list(suggest(found, 0.9).ranks) == ["model.layers.*.self_attn.q_proj"]


def test_suggested_ranks_are_the_smallest_and_a_recipe_takes_them(base: Path, tmp_path: Path):
    tuned = variant(base, tmp_path / "tuned", noise)
    found = analyse(Settings(str(base), str(tuned), rank=4), tmp_path / "out", reporter=Silent())
    suggestion = suggest(found, 0.4)
    for role, layers in found.roles().items():
        rank, captured = suggestion.ranks[role], curve(layers, "column")
        assert rank is not None
        assert float(captured[rank - 1]) >= 0.4 - 1e-5
        assert float(captured[rank - 2]) < 0.4
    paths = [layer.path for layer in found.layers]
    (tmp_path / "recipe.yaml").write_text(recipe_text(found, suggestion, paths))
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    config = pica.PicaConfig(
        r=recipe.adapter.r,
        target_modules=recipe.adapter.target_modules,
        rank_pattern=dict(recipe.adapter.rank_pattern),
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for layer in found.layers:
        module = model.get_base_model().get_submodule(layer.path)
        assert isinstance(module, PicaLinear)
        assert module.method.rank_of["default"] == suggestion.ranks[layer.role]


def test_ranks_from_the_base_alone(base: Path, tmp_path: Path):
    found = analyse(Settings(str(base)), tmp_path / "out", reporter=Silent())
    suggestion = suggest(found, 0.8)
    assert suggestion.source == "spectrum"
    tensors = load_file(base / "model.safetensors")
    for role, layers in found.roles().items():
        rank = suggestion.ranks[role]
        assert rank is not None
        squares = torch.stack([torch.linalg.svdvals(tensors[f"{la.path}.weight"].double()).square() for la in layers])
        pooled = squares.sum(0).cumsum(0) / squares.sum()
        assert pooled[rank - 1] >= 0.8 - 1e-6
        assert rank == 1 or pooled[rank - 2] < 0.8
    text = recipe_text(found, suggestion, [layer.path for layer in found.layers])
    assert yaml.safe_load(text)["adapter"]["rank_pattern"]


def test_a_pattern_names_its_role_and_no_other():
    roles = {
        "encoder.layer.*.attention.output.dense": ["encoder.layer.0.attention.output.dense"],
        "encoder.layer.*.output.dense": ["encoder.layer.0.output.dense"],
        "pooler.dense": ["pooler.dense"],
        "encoder.layer.*.attention.self.key": ["encoder.layer.0.attention.self.key"],
    }
    found = patterns(roles, [path for paths in roles.values() for path in paths])
    assert list(found.values()) == [r"attention\.output\.dense", r"\d+\.output\.dense", r"pooler\.dense", "key"]


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024


def measure(base: str, tuned: str, out: Path) -> None:
    """Print how much more memory an analysis takes than there was taken before."""
    libc = ctypes.CDLL(None)
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        # memory that is freed goes back at once, so that what is measured is what is held
        assert libc.mallopt(option, 65536)
    torch.linalg.svd(torch.randn(64, 64, dtype=torch.float64))
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    analyse(Settings(base, tuned, rank=8), out, reporter=Silent())
    done.set()
    thread.join()
    print(peak - before)  # noqa: T201


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of a process from /proc")
def test_memory_is_that_of_one_weight_however_many_there_are(tmp_path: Path):
    out, width = 16, 65536
    weight, grown = out * width * 8, {}
    for count in (2, 14):
        folder = tmp_path / str(count)
        for name, scale in (("base", 0.0), ("tuned", 0.01)):
            g, h = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
            (folder / name).mkdir(parents=True)
            tensors = {}
            for index in range(count):
                noise = scale * torch.randn(width, out, generator=h)
                tensors[f"blocks.{index}.up.weight"] = torch.randn(width, out, generator=g) + noise
            save_file(tensors, folder / name / "model.safetensors")
            (folder / name / "config.json").write_text("{}")
        process = processes.start(
            measure, str(folder / "base"), str(folder / "tuned"), folder / "out", said=folder / "said"
        )
        process.join(300)
        said = (folder / "said").read_text()
        assert process.exitcode == 0, said
        assert len((folder / "out" / PROGRESS).read_text().splitlines()) == 1 + count
        grown[count] = int(said.splitlines()[-1])
    assert 3 * weight < grown[14] < MEMORY_COPIES * weight
    # holding the twelve more weights of both models would take 12 such weights in float32, 24 in float64
    assert grown[14] - grown[2] < 9 * weight
