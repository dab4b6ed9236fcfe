"""No command writes where another one is writing, nor over what is there, unless it was told to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pica.files.claims import claimed
from pica.report.analysis_figures import Plate


@pytest.mark.parametrize("command", ["merge", "export", "import", "analyze", "evaluate", "report", "compare", "train"])
def test_whoever_comes_second_refuses(pica: Callable, tmp_path: Path, command: str):
    (tmp_path / "adapter_config.json").write_text("{}")
    given = {"analyze": ["embedded"], "compare": [], "train": []}.get(command, [tmp_path])
    with claimed(tmp_path / "out"):
        outcome = pica(command, *given, "-o", tmp_path / "out")
    assert outcome.status == 2
    assert "Another pica (process" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_file_that_is_there_is_kept(pica: Callable, tmp_path: Path, command: str):
    (tmp_path / "out").write_text("precious")
    outcome = pica(command, tmp_path, "-o", tmp_path / "out")
    assert outcome.status == 2
    assert "is there already; name another file with --output, or replace it with --overwrite." in outcome.err
    assert "is there already" not in pica(command, tmp_path, "-o", tmp_path / "out", "--overwrite").err
    assert (tmp_path / "out").read_text() == "precious", "a command that fails costs nothing"


def test_an_analysis_stopped_while_drawing_goes_on(pica: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    command = ["analyze", "embedded", "--only", "layers.0.self_attn.q", "-o", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(Plate, "save", stop)
        outcome = pica(*command)
    assert outcome.status == 130
    assert "The same command goes on from there." in outcome.err
    assert pica(*command).status == 0
    kept = (tmp_path / "out" / "analysis.json").read_bytes()
    other = [*command, "--suggest-rank", "0.9", "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(Plate, "save", stop)
        assert pica(*other).status == 130
    assert (tmp_path / "out" / "analysis.json").read_bytes() == kept, "until the new one is whole"
    assert pica(*other).status == 0
    assert (tmp_path / "out" / "rank_pattern.yaml").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
