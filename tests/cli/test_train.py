"""What `pica train` prints at its end."""

import json
from pathlib import Path

import pytest
from tests import results

from pica.cli.train import _print_answers
from pica.experiments.train.run import RunResult


def write(file: Path, answer: str, count: int) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {n}\nof many words " * 30},
                {"role": "assistant", "content": "gold"},
            ],
            **({"answer": answer} if n != 1 else {}),
        }
        for n in range(count)
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.mark.parametrize("columns", [80, 60, None])
def test_both_answers_and_the_next_commands_fit_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int | None
):
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    folder = Path("my run")
    folder.mkdir()
    write(folder / "predictions-base.jsonl", "w" * 300, 6)
    write(folder / "predictions-adapter.jsonl", "[bold]learnt\u2028words[/bold]", 6)
    _print_answers(RunResult(folder, results.metrics()), " --trust-remote-code")
    printed = capsys.readouterr().out
    table = printed[: printed.index("Talk to it:")]
    assert max(map(len, table.splitlines())) <= (columns or 80)
    assert table.count("w") > 3 * 200
    assert [f"question {n}" in printed for n in range(5)] == [True, False, True, True, False]
    assert printed.count("[bold]learnt") == 3
    for command in ("pica chat 'my run'", "pica merge 'my run' -o merged", "pica export 'my run' -o lora --for vllm"):
        assert f"{command} --trust-remote-code\n" in printed


def test_where_only_the_adapter_was_asked_there_is_one_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "predictions-adapter.jsonl", "learnt", 3)
    _print_answers(RunResult(tmp_path, results.metrics(adapter=results.trained(method="lora"))), "")
    printed = capsys.readouterr().out
    assert "with the adapter" in printed
    assert "base model" not in printed
    assert "pica export" not in printed
