"""The scripts of examples/, run as they are with tiny models."""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.experiments.tiny import write_tiny_llama
from tests.experiments.tiny_diffusion import write_stable_diffusion
from tests.experiments.tiny_encoder import write_tiny_bert

EXAMPLES = Path(__file__).parents[1] / "examples"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with a tiny Llama in it."""
    made = tmp_path_factory.mktemp("examples")
    write_tiny_llama(made / "llama")
    (made / "llama" / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", made / "cache")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield made


def example(name: str) -> Callable[..., Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_trainer(folder: Path, capsys: pytest.CaptureFixture[str]):
    losses = example("trainer")(str(write_tiny_bert(folder / "bert")), "films")
    assert losses[-1] < losses[0]
    assert "right: " in capsys.readouterr().out
    assert {"score", "classifier"} & {
        part for key in load_file("films/adapter_model.safetensors") for part in key.split(".")
    }


def test_sft(folder: Path):
    losses = example("sft")("llama", "maren", "6")
    assert losses[-1] < losses[0]
    assert (folder / "maren" / "chat_template.jinja").read_text() == TEMPLATE


def test_own_loop_and_several_adapters(folder: Path, capsys: pytest.CaptureFixture[str]):
    losses = example("own_loop")("llama", "light")
    assert losses[-1] < losses[0] - 0.5
    assert float(capsys.readouterr().out.rpartition("loading: ")[2]) < 1e-5
    example("own_loop")("llama", "other")
    said = example("several_adapters")("llama", "light", "other")
    assert said["light"] == said["other"], "the same training gives the same adapter"
    assert said["light"] != said["__base__"]


def test_diffusion(folder: Path, capsys: pytest.CaptureFixture[str]):
    losses = example("diffusion")(str(write_stable_diffusion(folder / "pipeline")), "dog")
    assert losses[-1] < losses[0]
    assert "adapted: unet" in capsys.readouterr().out
    assert (folder / "dog" / "dog.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_shows_every_example():
    text = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb", ".jsonl"))
    assert len(files) == 7
    assert [name for name in files if f"`examples/{name}`" not in text] == []
