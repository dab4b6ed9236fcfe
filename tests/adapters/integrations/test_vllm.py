"""vLLM's resolver against its documented interface, with real exports; tools/check_vllm.py tries it with vLLM itself."""

from __future__ import annotations

import asyncio
import stat
import sys
import tomllib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import _pica_entry
import pica
from pica.adapters.integrations import vllm as plugin
from pica.adapters.integrations.exporting import Exporter, Job, RefusedError
from pica.adapters.integrations.named import WEIGHTS
from pica.adapters.integrations.serving import AdapterServer, ServingOptions
from pica.adapters.integrations.vllm import PicaResolver
from pica.errors import ConfigError, OutputError

from ..conftest import adapted


@dataclass
class LoRARequest:
    """The fields of vLLM's."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class Models:
    """What vLLM's `OpenAIServingModels` keeps."""

    def __init__(self) -> None:
        self.lora_requests: dict[str, Any] = {"dave": "not ours"}


class Place:
    """Two base models, a folder of adapters, and one process that exports, for all tests of this file."""

    def __init__(self, folder: Path, tiny_llama: Callable[..., nn.Module]) -> None:
        self.root, self.make = folder, tiny_llama
        self.adapters = folder / "adapters"
        self.adapters.mkdir()
        for name, seed in (("base", 0), ("other", 1)):
            tiny_llama(seed=seed).save_pretrained(folder / name)  # pyright: ignore[reportCallIssue]
        self.base = str(folder / "base")
        self.runner = asyncio.Runner()
        self.exporter = Exporter()

    def add(self, name: str, *, seed: int = 0, base: int = 0) -> PeftModel:
        model = adapted(self.make(seed=base), seed=seed)
        model.save_pretrained(str(self.adapters / name))
        return model

    def server(self, cache: Path, **options: Any) -> AdapterServer:
        server = AdapterServer(ServingOptions(self.adapters, cache, **options), "vllm")
        server.exporter = self.exporter
        return server

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., nn.Module]) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("serving"), tiny_llama)
    yield made
    made.run(made.exporter.close())
    made.runner.close()


def test_an_adapter_is_exported_once_and_does_what_it_did(place: Place, tmp_path: Path) -> None:
    model = place.add("alice")
    resolver = PicaResolver(place.server(tmp_path), LoRARequest)
    found = place.run(resolver.resolve_lora(place.base, "alice"))
    assert (found.lora_name, found.lora_int_id > 0) == ("alice", True)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        served = PeftModel.from_pretrained(place.make(), found.lora_path)(input_ids=ids).logits
        wanted = model(input_ids=ids).logits
        plain = place.make()(input_ids=ids).logits
    assert float((served - wanted).abs().max()) < 0.02 * float((wanted - plain).abs().max())  # bfloat16 factors
    for file in Path(found.lora_path).iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask(), file.name
    made = (Path(found.lora_path) / WEIGHTS).stat()
    again = place.run(PicaResolver(place.server(tmp_path), LoRARequest).resolve_lora(place.base, "alice"))
    assert again == found
    assert (Path(found.lora_path) / WEIGHTS).stat() == made


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_smaller_rank_is_an_export_of_its_own(place: Place, tmp_path: Path) -> None:
    place.add("small")
    exact, cut = (
        place.run(PicaResolver(place.server(tmp_path, rank=rank), LoRARequest).resolve_lora(place.base, "small"))
        for rank in (None, 5)
    )
    assert exact.lora_path != cut.lora_path
    sizes = [(Path(found.lora_path) / WEIGHTS).stat().st_size for found in (exact, cut)]
    assert sizes[1] < 0.6 * sizes[0]  # ranks 16 and 8 of vLLM's


def test_names_that_are_none(place: Place, tmp_path: Path) -> None:
    resolver = PicaResolver(place.server(tmp_path), LoRARequest)
    for name in ("nobody", "../base", "/etc", ""):
        assert place.run(resolver.resolve_lora(place.base, name)) is None
    assert not list(tmp_path.glob("[!.]*"))


def test_what_is_damaged_or_of_another_base_is_refused(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.add("cut-short")
    weights = place.adapters / "cut-short" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-40])
    place.add("elsewhere", base=1)
    resolver = PicaResolver(place.server(tmp_path), LoRARequest)
    for name, reason in (("cut-short", "damaged or cut short"), ("elsewhere", "another base")):
        with pytest.raises(RefusedError, match=reason) as refused:
            place.run(resolver.resolve_lora(place.base, name))
        assert isinstance(refused.value, ValueError)  # which vLLM answers with status 400
        assert name in str(refused.value)
        assert str(place.root) not in str(refused.value)
        assert reason in caplog.text
    assert not list(tmp_path.glob("[!.]*"))
    # a client that asks again and again costs nothing
    runs = []
    resolver._server.exporter = SimpleNamespace(run=runs.append)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RefusedError, match="another base"):
        place.run(resolver.resolve_lora(place.base, "elsewhere"))
    assert not runs
    # and it is served as soon as it is put right, for the base that it is of
    assert place.run(
        PicaResolver(place.server(tmp_path), LoRARequest).resolve_lora(str(place.root / "other"), "elsewhere")
    )
    place.add("cut-short")
    assert place.run(PicaResolver(place.server(tmp_path), LoRARequest).resolve_lora(place.base, "cut-short"))


def test_a_changed_adapter_is_exported_anew(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "SECONDS_BETWEEN_LOOKS", 0.01)
    place.add("carol")
    resolver = PicaResolver(place.server(tmp_path), LoRARequest)
    models = Models()
    resolver.watch_for(models)

    async def gone() -> None:
        async with asyncio.timeout(20):
            while "carol" in models.lora_requests:
                await asyncio.sleep(0.01)

    before = place.run(resolver.resolve_lora(place.base, "carol"))
    models.lora_requests["carol"] = before
    with pytest.raises(TimeoutError):
        place.run(asyncio.wait_for(gone(), 0.2))
    place.add("carol", seed=5)
    place.run(gone())
    after = place.run(resolver.resolve_lora(place.base, "carol"))
    assert after.lora_path != before.lora_path  # vLLM's prefix cache goes by the path
    assert models.lora_requests == {"dave": "not ours"}


def test_two_servers_make_one_export_and_a_dead_process_is_said(place: Place, tmp_path: Path) -> None:
    place.add("erin")

    async def both() -> list[Any]:
        servers = [place.server(tmp_path), place.server(tmp_path)]
        servers[1].exporter = Exporter()
        found = await asyncio.gather(
            *(PicaResolver(server, LoRARequest).resolve_lora(place.base, "erin") for server in servers)
        )
        second = servers[1].exporter
        assert second._process is not None
        second._process.kill()
        job = Job(str(place.adapters / "erin"), str(tmp_path / "again"), place.base, "vllm")
        with pytest.raises(OutputError, match="ended with status -9"):
            await second.run(job)
        return found

    found = place.run(both())
    assert found[0] == found[1]
    assert len(list(tmp_path.glob("[!.]*"))) == 1


def test_a_damaged_export_is_made_again(place: Place, tmp_path: Path) -> None:
    place.add("frank")
    resolver = PicaResolver(place.server(tmp_path), LoRARequest)
    found = place.run(resolver.resolve_lora(place.base, "frank"))
    weights = Path(found.lora_path) / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert place.run(resolver.resolve_lora(place.base, "frank")) == found
    assert weights.read_bytes() == whole


def test_options_come_from_the_environment(tmp_path: Path) -> None:
    read = ServingOptions.read
    adapters = {"PICA_VLLM_ADAPTERS": str(tmp_path)}
    assert read({**adapters, "PICA_CACHE_DIR": str(tmp_path)}).cache == tmp_path / "vllm"
    given = read({**adapters, "PICA_VLLM_ENERGY": "0.9", "PICA_VLLM_CACHE": "here", "PICA_VLLM_CACHE_LIMIT": "1000"})
    assert (given.energy, given.rank, given.cache, given.limit) == (0.9, None, Path.cwd() / "here", 1000)
    for wrong in ({"RANK": "0"}, {"RANK": "1.5"}, {"ENERGY": "2"}, {"ENERGY": "nan"}, {"CACHE_LIMIT": "-1"}):
        with pytest.raises(ConfigError, match=f"PICA_VLLM_{next(iter(wrong))}="):
            read({**adapters, **{f"PICA_VLLM_{name}": text for name, text in wrong.items()}})
    with pytest.raises(ConfigError, match="set one of them"):
        read({**adapters, "PICA_VLLM_RANK": "8", "PICA_VLLM_ENERGY": "0.9"})


def test_the_entry_point_costs_nothing_unless_it_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(pica.__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"]["pica"] == "_pica_entry:vllm_plugin"
    monkeypatch.delenv("PICA_VLLM_ADAPTERS", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    _pica_entry.vllm_plugin()
    monkeypatch.setenv("PICA_VLLM_ADAPTERS", "/nowhere")
    with pytest.raises(ImportError):
        _pica_entry.vllm_plugin()
