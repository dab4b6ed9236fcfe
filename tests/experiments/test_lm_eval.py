"""lm-evaluation-harness on a PiCa adapter, by the line that docs/evaluation.md gives."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import pica
from tests.experiments.tiny import write_tiny_llama

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is in no extra: it needs other versions than our tested set"
)

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
CHOICES = [" red", " blue", " a longer one"]


def documented_command() -> list[str]:
    """The page's one line, as words; its base model, adapter and tasks are for the test to fill in."""
    (line,) = re.findall(r"^    (python -c .*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return shlex.split(line)


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Path]:
    base = write_tiny_llama(tmp_path / "base")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), pica.PicaConfig(r=4, task_type="CAUSAL_LM"))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(tmp_path / "adapter"))
    return base, tmp_path / "adapter"


def test_the_documented_line_scores_the_adapter_and_not_its_base(adapter: tuple[Path, Path], tmp_path: Path):
    base, folder = adapter
    questions = [f"The colour of number {number} is" for number in range(3)]
    rows = [{"question": question, "gold": 0} for question in questions]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks" / "colours.yaml").write_text(yaml.safe_dump(task))
    words = documented_command()
    assert words[0] == "python"
    words[words.index("--model_args") + 1] = f"pretrained={base},peft={folder}"
    words[words.index("--tasks") + 1] = "colours"
    more = ["--include_path", tmp_path / "tasks", "--output_path", tmp_path / "out", "--log_samples", "--device", "cpu"]
    done = subprocess.run([sys.executable, *words[1:], *map(str, more)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()

    def likelihood(question: str, choice: str) -> float:
        ids = tokenizer(question + choice, return_tensors="pt")["input_ids"]
        start = len(tokenizer(question)["input_ids"])
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(-1)
        return sum(scores[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))

    expected = [[likelihood(question, choice) for choice in CHOICES] for question in questions]
    for sample in found:
        scored = [float(response[0]) for response in sample["filtered_resps"]]
        assert scored == pytest.approx(expected[questions.index(sample["doc"]["question"])], abs=1e-3)
    with model.disable_adapter():
        assert likelihood(questions[0], CHOICES[0]) != pytest.approx(expected[0][0], abs=0.1)
