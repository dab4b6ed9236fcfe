"""The site: each page is in its navigation, what a page refers to is there, and the start page is of the results."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml
from tools import docs_numbers, draw_results

import pica

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


class _Loader(yaml.SafeLoader):
    """Reads the tags that name Python functions as nothing."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def leaves(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    entries = entry.values() if isinstance(entry, dict) else entry
    return [leaf for inner in entries for leaf in leaves(inner)]


def test_the_navigation_has_each_page_once_and_two_clicks_away():
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)["nav"]  # a SafeLoader's child
    assert sorted(leaves(navigation)) == [page.name for page in PAGES]
    for tab in navigation:
        for page in next(iter(tab.values())):
            assert isinstance(page, str) or isinstance(next(iter(page.values())), str), f"{page} is a third click away"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_what_a_page_refers_to_is_there(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text)
    missing = [target for target in targets if "://" not in target and not (page.parent / target).is_file()]
    assert missing == []
    if page.parent == DOCS:
        outside = [target for target in targets if target.startswith("..")]
        assert outside == [], "the site holds nothing outside docs/"


def test_the_picture_is_of_the_results():
    shown = re.findall(
        r'<g id="((?:comparison_[\w-]+|digits):[^"]+)"', draw_results.PICTURE.read_text(encoding="utf-8")
    )
    expected = [
        draw_results.mark(name, row) for name in draw_results.TASKS for row in draw_results.points(name).values()
    ]
    assert len(expected) > 10
    assert sorted(shown) == sorted(expected), "run python tools/draw_results.py"


def test_verdicts_follow_from_the_numbers():
    one = {"score_low": 0.8, "score_mean": 0.85, "score_high": 0.9, "loss_mean": 0.3, "loss_sd": 0.01}
    far = one | {"score_low": 0.5, "score_mean": 0.6, "score_high": 0.7, "loss_mean": 0.5}
    assert docs_numbers._verdict(one, one) == "accuracy: a tie; loss: a tie"
    assert docs_numbers._verdict(one, far) == "accuracy: PiCa; loss: PiCa lower"
    assert docs_numbers._verdict(far, one) == "accuracy: LoRA; loss: LoRA lower"
    assert (
        docs_numbers._verdict(one, one | {"loss_sd": None, "loss_mean": 0.2})
        == "accuracy: a tie; loss: LoRA lower, one seed"
    )


def test_the_first_example_prints_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, said = (
        re.findall(f"^```{kind}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)[0] for kind in ("python", "text")
    )
    assert len(code.splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == said
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_drafts_for_other_projects_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PEFT reads the experiment's configuration, and what its hooks lack, they lack still."""
    text = (DOCS / "upstream.md").read_text(encoding="utf-8")
    settings = re.findall(r"^```json\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)[0]
    (tmp_path / "adapter_config.json").write_text(settings)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)) == pica.PicaConfig(
        **json.loads(settings) | {"peft_type": "PICA"}
    )
    monkeypatch.chdir(tmp_path)
    for block, error in zip(
        re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE), (ValueError, KeyError, ValueError)
    ):
        with pytest.raises(error) as found:
            exec(compile(block, "upstream.md", "exec"), {})
        said = re.findall(rf"^# {error.__name__}: (.*)$", block, flags=re.MULTILINE)[0].removesuffix(" ...")
        assert str(found.value).startswith(said)
