"""`pica evaluate`: measure a model or an adapter on a task."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pica.cli.options import add_trust, command_parser, positive
from pica.cli.show import show
from pica.text import counted, in_words

EPILOG = """examples:
  pica evaluate pica-arithmetic-tiny                          the run's own task and test problems
  pica evaluate out/adapter --data test.jsonl -o answers.jsonl
  pica evaluate ./SmolLM2-135M --task math --data test.jsonl --limit 200
  pica evaluate ./my-classifier --task sentiment --data dev.tsv
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "evaluate",
        "Answer problems (greedily, where text is generated) and print the task's metric and held-out loss.",
        EPILOG,
    )
    made.add_argument("model", metavar="MODEL", help="a model, an adapter folder, or the output folder of pica train")
    made.add_argument(
        "--base", "--base-model", metavar="MODEL", help="base model of the adapter, if not the one it records"
    )
    made.add_argument(
        "--task",
        help="arithmetic, commonsense, glue, images, math, sentiment or vtab; an adapter's run knows its own",
    )
    made.add_argument("--subset", help="glue: which of the eight; vtab: which of the nineteen")
    made.add_argument(
        "--labels", nargs="+", metavar="NAME", help="classes in the order of the outputs, if no run knows them"
    )
    made.add_argument("--metric", help="classification: accuracy, f1, matthews, pearson or spearman")
    made.add_argument(
        "--data",
        metavar="FILE",
        help="test problems: a .json, .jsonl, .tsv or .csv file, a folder, hub:OWNER/NAME or embedded",
    )
    made.add_argument(
        "--columns", type=_mapping, metavar="MAP", help="names of the task's fields in the file, '{text: review}'"
    )
    made.add_argument("--limit", type=positive, metavar="N", help="use the first N problems")
    made.add_argument("--skip-unreadable", action="store_true", help="leave pictures out that cannot be decoded")
    made.add_argument(
        "--scoring",
        choices=("generation", "likelihood"),
        help="commonsense: what the model writes, or the likeliest choice",
    )
    made.add_argument("--template", help="prompt: alpaca, question or plain")
    made.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer")
    made.add_argument("--batch-size", type=positive, default=32, metavar="N", help="problems at once (default: 32)")
    made.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="precision of the model")
    made.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    add_trust(made)
    made.add_argument("-o", "--output", type=Path, metavar="FILE", help="write every prediction to this .jsonl file")
    made.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    made.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, evaluate and print."""
    given = parser().parse_args(arguments)

    from pica.cli.console import loading

    with loading() as shown:
        from pica.experiments.evaluate.assessing import Request, assess
        from pica.experiments.results.documents import to_document
        from pica.files.output import json_text
    options = {name: value for name, value in vars(given).items() if name != "json"}
    found = assess(Request(**options), reporter=shown)
    summary = {"model": found.model, "task": found.task, "data": found.data, **to_document(found.result.measurement())}
    if given.json:
        show(json_text(summary, indent=2))
        return 0
    result = found.result
    show(f"{found.model} on {found.task} ({found.data}), {counted(result.examples, 'problem')}")
    lines: dict[str, str] = {}
    for name, value in result.metrics.items():
        if name.endswith("_stderr"):
            continue
        own = result.metrics.get(f"{name}_stderr")
        error = _uncertainty(result) if name == result.metric else _error(name, own)
        lines[in_words(name)] = f"{_shown(name, value)}{error}"
    for name, group in result.groups.items():
        lines[f"  {name}"] = f"{group.accuracy:.2%} ± {group.stderr:.2%} of {group.examples}"
    unit = f"nats a token over {result.tokens} tokens" if result.tokens is not None else "an example"
    lines["held-out loss"] = f"{result.loss:.4f} {unit}{_error('loss', result.metrics.get('loss_stderr'))}"
    if given.output is not None:
        lines["predictions"] = str(given.output)
    width = max(map(len, lines))
    for name, text in lines.items():
        show(f"{name:<{width}}  {text}")
    return 0


def _error(metric: str, stderr: float | None) -> str:
    return "" if stderr is None or not math.isfinite(stderr) else f" ± {_shown(metric, stderr)} (standard error)"


def _uncertainty(result: Any) -> str:
    """The standard error; Wilson's interval where few answers are right, or wrong."""
    from pica.experiments.uncertainty import near_the_end, score_interval, shown_interval

    if near_the_end(result.metric, result.score, result.examples):
        interval = score_interval(result.metric, result.score, result.stderr, result.examples)
        return f" ({shown_interval(result.metric, interval)}, 95% interval)"
    return _error(result.metric, result.stderr)


def _shown(metric: str, value: float) -> str:
    if not math.isfinite(value):
        return "undefined"
    from pica.experiments.uncertainty import SHARES

    return f"{value:.2%}" if metric in SHARES else f"{value:.4f}"


def _mapping(text: str) -> dict[str, str | dict[str, str]]:
    import yaml

    from pica.files.documents import parse_yaml

    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no mapping such as '{{text: review, label: stars}}'")
    return {
        str(name): {str(field): str(own) for field, own in column.items()} if isinstance(column, dict) else str(column)
        for name, column in value.items()
    }
