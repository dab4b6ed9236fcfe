"""What `pica analyze` says of an update, by how the update was made."""

import json
from pathlib import Path

import peft
import pytest
import torch
from tests.experiments.analyze.test_analysis import in_column_space, noise, variant
from tests.experiments.tiny import write_tiny_llama
from tests.report.browser import check_page
from transformers import AutoModelForCausalLM

import pica
from pica.experiments.analyze.analysis import analyse
from pica.experiments.reporting import Silent
from pica.experiments.results.analysis import Settings
from pica.report.analysis_report import console_table, verdict, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


def adapter(model: Path, folder: Path, config: peft.PeftConfig) -> Path:
    """An adapter whose trained values are not zero."""
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (pica.PicaConfig(r=4, target_modules=["q_proj"]), "the top 4 directions of each layer's column space"),
        (pica.PicaConfig(r=4, projection="minor", target_modules=["q_proj"]), "the last 4 directions"),
        (pica.PicaConfig(r=4, projection="random", target_modules=["q_proj"]), "4 random directions"),
        (pica.SvftConfig(target_modules=["q_proj"]), "the singular vectors of each weight"),
    ],
)
def test_an_adapter_that_was_trained_inside_a_space_is_no_finding(
    model: Path, tmp_path: Path, config: peft.PeftConfig, where: str
):
    tuned = adapter(model, tmp_path / "adapter", config)
    found = analyse(Settings(str(model), str(tuned), rank=8), tmp_path / "out", reporter=Silent())
    first, *others = verdict(found)
    assert first.startswith(f"No finding: this adapter's update was trained inside {where}")
    assert all("Does the update lie in it" not in sentence for sentence in others)
    assert all("Theorem 1" not in sentence for sentence in others)


def test_the_page_warns_and_the_data_say_why(model: Path, tmp_path: Path):
    tuned = adapter(model, tmp_path / "adapter", pica.PicaConfig(r=4, target_modules=["q_proj"]))
    found = analyse(Settings(str(model), str(tuned), rank=8), tmp_path / "out", reporter=Silent())
    write(found, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    check_page(text)
    assert "<strong>Warning.</strong> No finding: this adapter" in text
    assert text.count("No finding") == 1
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["confined"] == verdict(found)[0]


def test_a_model_that_such_an_adapter_was_merged_into_is_known_by_its_numbers(model: Path, tmp_path: Path):
    tuned = variant(model, tmp_path / "tuned", in_column_space(3))
    found = analyse(Settings(str(model), str(tuned), rank=2), tmp_path / "out", reporter=Silent())
    assert verdict(found)[0].startswith("No finding: the top 3 directions of the column space hold all of the update")


def test_other_updates_are_findings(model: Path, tmp_path: Path):
    lora = adapter(model, tmp_path / "adapter", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for tuned in (lora, variant(model, tmp_path / "tuned", noise)):
        found = analyse(Settings(str(model), str(tuned), rank=8), tmp_path / tuned.name, reporter=Silent())
        assert "No finding" not in " ".join(verdict(found))
        assert any("Does the update lie in it" in sentence for sentence in verdict(found))
        assert "column" in console_table(found)
