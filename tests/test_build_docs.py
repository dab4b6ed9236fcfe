"""The pages that are built hold what their code and data give."""

import re

import pytest
from tools import build_docs

NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?")


@pytest.mark.parametrize("page", build_docs.PAGES)
def test_a_page_holds_the_numbers_that_its_script_computes(page: str):
    """Words are equal; numbers agree to one in the last digit, since platforms round differently."""
    built, committed = build_docs.build(page), (build_docs.DOCS / page).read_text(encoding="utf-8")
    assert NUMBER.sub("#", built) == NUMBER.sub("#", committed), "run python tools/build_docs.py"
    pairs = list(zip(NUMBER.findall(built), NUMBER.findall(committed), strict=True))
    assert len(pairs) > 40
    for one, other in pairs:
        decimals = len(other.partition(".")[2].partition("e")[0])
        unit = 0.0 if "." not in other and "," not in other else 10.0**-decimals
        expected = float(other.replace(",", ""))
        relative = 0.01 if "e" in other or "," in other else 0.0
        assert abs(float(one.replace(",", "")) - expected) <= 1.01 * unit + relative * abs(expected), (one, other)


def test_pictures_are_there():
    text = (build_docs.DOCS / "theory-in-practice.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 8
    assert all((build_docs.DOCS / picture).read_bytes()[:4] == b"\x89PNG" for picture in pictures)
