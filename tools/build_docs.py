"""Build the pages of docs/ whose numbers are computed.

    python tools/build_docs.py     write the pages of PAGES into docs/
    python tools/build_docs.py --take OUT TUNED NAME
                                   keep the results of `pica analyze BASE TUNED -o OUT` as docs/theory/NAME*

A page is a Jinja template in tools/docs. Its Python blocks are run in order in one namespace, which the text then uses.
The pages' measured data lie in docs/theory, so that building needs no fine-tuned model.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import jinja2

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.docs_numbers import against_lora, recipe_sections, ties

ROOT = Path(__file__).parents[1]
TEMPLATES, DOCS = ROOT / "tools" / "docs", ROOT / "docs"
PAGES = ("theory-walkthrough.md", "theory-in-practice.md", "index.md", "recipe-fields.md")


def build(page: str) -> str:
    """The text of a page of `PAGES`, with its code run."""
    source = (TEMPLATES / f"{page}.jinja").read_text(encoding="utf-8")
    helpers = (study, intruders, wedin_share, extreme, times, ranks_of, over_chance, against_lora, recipe_sections)
    namespace: dict[str, Any] = {helper.__name__: helper for helper in helpers}
    namespace |= {"sst2": ties("comparison_minilm-sst2"), "digits": ties("digits")}
    for block in re.findall(r"^```python\n(.*?)^```$", source, flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), namespace)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"number": number, "numbers": numbers, "percent": percent}
    return environment.from_string(source).render(namespace)


def number(value: Any) -> str:
    """Three significant digits."""
    value = float(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def numbers(values: Any) -> str:
    return ", ".join(number(value) for value in values)


def percent(value: Any) -> str:
    return f"{float(value):.1%}"


def study(name: str) -> dict[str, Any]:
    """Measured data of a run that `take` has kept: analysis and fine-tuning."""
    return json.loads((DOCS / "theory" / f"{name}.json").read_text(encoding="utf-8"))


def intruders(run: dict[str, Any]) -> int:
    return round(sum(role["intruders"] * role["layers"] for role in run["roles"]))


def wedin_share(run: dict[str, Any]) -> float:
    """Share of ranks, layers weighing alike, at which Lemma 3.1 excludes anything."""
    layers = sum(role["layers"] for role in run["roles"])
    return sum(role["wedin_informative"] * role["layers"] for role in run["roles"]) / layers


def extreme(run: dict[str, Any], which: str) -> str:
    """Smallest or largest ratio of column space to chance over the roles, and whose it is."""
    choose = {"low": min, "high": max}[which]
    role = choose(run["roles"], key=lambda s: s["column"] / s["chance"])
    return f"{role['column'] / role['chance']:.2f} ({role['role'].split('*.')[-1]})"


def times(run: dict[str, Any], name: str, kind: str) -> str:
    """Share of the "column" or "row" space of a role over what chance gives, at the run's rank."""
    found = next(s for s in run["roles"] if s["role"].split("*.")[-1] == name)
    return f"{found[kind] / found[{'column': 'chance', 'row': 'row_chance'}[kind]]:.2f}"


def ranks_of(run: dict[str, Any]) -> list[int]:
    most = max(role["curves"]["r"][-1] for role in run["roles"])
    return [r for r in (8, 16, 32, 64, 128, 256) if r < most]


def over_chance(role: dict[str, Any], rank: int) -> str:
    """Column space over chance at a rank, a power of two; nothing where the role has fewer directions."""
    ranks = role["curves"]["r"]
    if rank > ranks[-1]:
        return ""
    return f"{role['curves']['column'][ranks.index(rank)] / (rank / role['inn']):.2f}"


def take(results: Path, tuned: Path, name: str) -> None:
    """Keep what the pages need of an analysis: the roles with their curves, and the figures with fewer colours."""
    from PIL import Image

    found = json.loads((results / "analysis.json").read_text(encoding="utf-8"))
    del found["layers"]
    # where the models lay on this machine is nobody's business
    found["settings"] |= {key: Path(found["settings"][key]).name for key in ("base", "tuned")}
    found["fine_tuning"] = json.loads((tuned / "fine_tuning.json").read_text(encoding="utf-8"))
    del found["fine_tuning"]["losses"]
    folder = DOCS / "theory"
    folder.mkdir(exist_ok=True)
    text = json.dumps(found, indent=1)
    text = re.sub(r"\[[\s\d.,-]+\]", lambda match: re.sub(r"\s+", " ", match[0]), text)  # a curve on one line
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    for figure in sorted((results / "figures").glob("*.png")):
        Image.open(figure).convert("RGB").quantize(256).save(folder / f"{name}-{figure.name}", optimize=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", nargs=3, metavar=("RESULTS", "TUNED", "NAME"))
    given = parser.parse_args(argv)
    if given.take:
        take(Path(given.take[0]), Path(given.take[1]), given.take[2])
        return 0
    for page in PAGES:
        (DOCS / page).write_text(build(page), encoding="utf-8")
        print(f"docs/{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
