"""`pica train`: fine-tune a model after a recipe and measure what it gained."""

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pica.cli.data import SEEN
from pica.cli.options import Words, add_trust, command_parser, fitted, split_words
from pica.cli.show import show
from pica.errors import ConfigError
from pica.foreign_code import FLAG
from pica.text import counted, in_words, shortened

if TYPE_CHECKING:
    from pica.cli.console import ConsoleReporter
    from pica.experiments.data import Splits
    from pica.experiments.recipes.recipe import Recipe
    from pica.experiments.reporting import Reporter
    from pica.experiments.results.run import Measurement, RunMetrics
    from pica.experiments.train.run import RunResult

DEFAULT = "arithmetic-tiny"

USAGE = """pica train [RECIPE] [--section.field VALUE ...] [-o DIR] [--dry-run]
       pica train --resume [DIR]
       pica train --help-all | pica help train SECTION"""

DESCRIPTION = """Fine-tune a model with an adapter, and measure it before and after on problems
that it has not seen. RECIPE is a YAML file or one of `pica recipes`; all of its
fields can be set here too. Without RECIPE and --model.path it is {default},
unless the data is conversations; that needs no download and takes a few minutes
on two cores.
"""

EPILOG = """{shown}All fields: pica train --help-all
One section: pica help train SECTION, which is one of
{sections}

examples:
  pica train
  pica train --model.path SmolLM2-135M-Instruct --data.train chats.jsonl -o out
  pica train mine.yaml --adapter.r 64 --trainer.learning_rates '[3e-4, 1e-3]'
  pica train --resume out

The output folder gets adapter/ (for PEFT), recipe.resolved.yaml, metrics.json,
loss_curve.csv and predictions-*.jsonl. Ctrl-C stops after the current step and
leaves a checkpoint. In several processes: accelerate launch -m pica train ...,
or torchrun; trainer.batch_size is then that of each.
"""


def run(arguments: Sequence[str]) -> int:
    """Parse, train, and print the comparison."""
    from pica.experiments.recipes.parsing import load_recipe

    if {"-h", "--help", "--help-all"} & set(arguments):
        topics = [argument for argument in arguments if not argument.startswith("-")]
        show(help_text(topics, everything="--help-all" in arguments), end="")
        return 0
    reference, overrides, options = split_arguments(arguments)
    resumed: str | None = options.get("resume")  # "" without a folder
    overwrite, page, dry_run = (options.get(name, False) for name in ("overwrite", "page", "dry_run"))
    trusted: bool = options.get("trust_remote_code", False)
    if resumed is not None and (overrides or overwrite):
        given = ", ".join([f"--{key}" for key, _ in overrides] + ["--overwrite"] * overwrite)
        raise ConfigError(f"--resume goes on with the recipe that the run began with; leave out {given}.")
    if resumed and reference is not None:
        raise ConfigError(
            f"--resume {resumed} goes on with the recipe that the run began with; leave out {reference!r}."
        )
    found = _task_of_data(reference, overrides)
    if reference is None and not found and not any(key == "model.path" for key, _ in overrides):
        reference = DEFAULT
    folder = Path(resumed).expanduser() if resumed else None
    if dry_run and resumed is not None:
        raise ConfigError("--dry-run shows what a new run would see; leave out --resume.")
    if trusted and resumed is None:
        overrides.append(("model.trust_remote_code", True))
    recipe = None if folder else load_recipe(reference, [*overrides, *found])
    if dry_run and recipe is not None and recipe.task.name not in SEEN:
        raise ConfigError(
            f"--dry-run is for tasks {', '.join(SEEN)}, and the task is {recipe.task.name}; leave it out."
        )

    from pica.cli.console import loading

    with loading() as shown:
        splits = None
        if recipe is not None and resumed is None:
            from pica.experiments.data import load_texts

            splits = load_texts(recipe)
        from pica.experiments.train.run import default_output, resume, start
    if recipe is None or resumed is not None:
        folder = folder or default_output(recipe)  # pyright: ignore[reportArgumentType]
        shown.say(f"Resuming {folder}")
        result = _followed(
            lambda reporter: resume(folder, reporter=reporter, trust_remote_code=trusted),
            shown,
            page=page,
        )
    else:
        shown.say(f"Recipe {recipe.name}: {recipe.model.path} on {recipe.task.name}, into {default_output(recipe)}")
        if recipe.model.trust_remote_code:
            shown.say(f"Python code that comes with {recipe.model.path} is run (model.trust_remote_code)")
        if dry_run and splits is not None:
            _look(recipe, splits)
            return 0
        result = _followed(
            lambda reporter: start(recipe, reporter=reporter, overwrite=overwrite, splits=splits),
            shown,
            page=page,
        )
    from pica.experiments.distributed import leads

    if leads():
        print_result(result, page=page)
        if result.metrics.task == "dreambooth":
            _print_pictures(result)
        if result.metrics.task in ("chat", "preference"):
            trusts = trusted or (recipe is not None and recipe.model.trust_remote_code)
            _print_answers(result, f" {FLAG}" if trusts else "")
    return 0


def _followed(go: "Callable[[Reporter], RunResult]", shown: "ConsoleReporter", *, page: bool) -> "RunResult":
    """Run, and keep the run's page up to date if that is wanted; at the end it is the one of `pica report`."""
    if not page:
        return go(shown)
    from pica.cli.run_page import PageReporter
    from pica.errors import PicaError
    from pica.experiments.distributed import leads
    from pica.experiments.interrupts import Interrupted
    from pica.report.run_page import write_run_page

    reporter = PageReporter(shown)
    try:
        result = go(reporter)
    except (Interrupted, KeyboardInterrupt):
        reporter.end("Stopped; pica train --resume with this folder goes on.")
        raise
    except PicaError as error:
        reporter.end(str(error))
        raise
    if leads() and result.metrics.task != "dreambooth":  # which has a page of its own
        write_run_page(result.output)
    return result


def _look(recipe: "Recipe", splits: "Splits") -> None:
    """Show what a model would see of a recipe's training data, without what is held out of it."""
    from pica.cli.data import look, print_preview

    found, facts = look(recipe, splits.train, splits.test, examples=3)
    held = {"held out": f"{len(splits.test):,} to be measured on"}
    if splits.validation:
        held["validation"] = f"{len(splits.validation):,} to choose by"
    print_preview(found, facts | held)


def _task_of_data(reference: str | None, overrides: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Task chat or preference, where no task is named and the data is conversations or pairs of answers; else nothing."""
    given = dict(overrides)
    if reference is not None or "task.name" in given or "data.train" not in given:
        return []
    from pica.experiments.recipes.parsing import read_field
    from pica.experiments.recipes.recipe import columns_of, weights_of
    from pica.experiments.recipes.starting import talking_task

    train = read_field("data.train", given["data.train"])
    # What is wrong with a place is said where the recipe is checked.
    first = next(iter(weights_of(train)), "embedded")
    found = talking_task(first, columns_of(read_field("data.columns", given.get("data.columns", {})), "train", first))
    if found is None and not isinstance(train, str):
        found = "chat"
    return [("task.name", found)] if found else []


def split_arguments(arguments: Sequence[str]) -> Words:
    """Split what follows `pica train`; a folder is a recipe's field, `output`."""
    return split_words(
        arguments,
        noun="recipe",
        flags=("--overwrite", "--page", "--dry-run", FLAG),
        optional=("--resume",),
        is_field=lambda name: name.startswith("--"),
        advice="fields are set as --section.field VALUE, see pica train --help.",
    )


def help_text(topics: Sequence[str] = (), *, everything: bool = False) -> str:
    """Help with the fields of a recipe: those that matter first, those of some sections, or all.

    Args:
        topics: Sections; the fields that matter first if there are none.
        everything: Show all fields.

    Returns:
        The text.

    Raises:
        ConfigError: A topic is no section.
    """
    from pica.cli.recipe_help import check_topics
    from pica.experiments.recipes.parsing import builtin_recipes, section_names

    topics = [topic for topic in topics if topic not in builtin_recipes()]
    check_topics(topics)
    made = parser(topics, everything=everything)
    shown = "" if topics or everything else "These are the fields that matter first. "
    made.epilog = fitted(EPILOG.format(shown=shown, sections=", ".join(section_names())))
    return made.format_help()


def parser(topics: Sequence[str] = (), *, everything: bool = False) -> argparse.ArgumentParser:
    """The options as argparse knows them, for help and completion; `split_arguments` reads them."""
    from pica.cli.recipe_help import add_fields

    made = command_parser("train", DESCRIPTION.format(default=DEFAULT), usage=USAGE, options_at=30)
    made.add_argument("recipe", nargs="?", metavar="RECIPE", help=argparse.SUPPRESS)
    made.add_argument("-o", "--output", metavar="DIR", help="folder for results (default: pica-NAME)")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output folder")
    made.add_argument("--resume", metavar="DIR", nargs="?", help="go on with the interrupted run in DIR")
    add_trust(made)
    made.add_argument("--page", action="store_true", help="write DIR/report.html as the run goes, to be watched")
    made.add_argument("--dry-run", action="store_true", help="only show what a model would see of the data")
    made.add_argument("--help-all", action="store_true", help="show every field of a recipe")
    made.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    add_fields(made, sections=topics, everything=everything)
    return made


def print_result(result: "RunResult", *, page: bool = False) -> None:
    """The comparison as a table, and what lies where."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from pica.cli.console import print_sentences, table_console
    from pica.experiments.results.run import CURVE, METRICS

    metrics = result.metrics
    kind = "picture" if metrics.task == "dreambooth" else "test problem"
    title = f"{metrics.name}: {counted(metrics.problems.test, kind)}, one seed"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE, pad_edge=False)
    adapter, metric = metrics.adapter, metrics.adapter.metric
    for column in ("", "trainable", "rate", in_words(metric), "loss", "ms/step", "peak\nMiB"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    if metrics.base is not None:
        table.add_row("base model", "", "", *_scores(metrics.base), "", "")
    for row in metrics.trained.values():
        step = row.training.step_seconds
        table.add_row(
            Text(row.title),
            f"{row.parameters.trainable - row.parameters.head:,}",
            f"{row.learning_rate:g}",
            *_scores(row),
            f"{1000 * step:.1f}" if step else "",
            f"{row.training.peak:.0f}",
        )
    console = table_console()
    console.print(table)
    unit = "loss on the gold answers in nats a token" if adapter.tokens is not None else f"loss on the {kind}"
    for name in ("chosen_likelier", "reward_margin", "mean_reward"):
        if name in adapter.scores:
            console.print(f"{in_words(name)}: {_change(metrics, name)}", markup=False)
    if metrics.standing is not None:
        print_sentences(console, metrics.standing.statement)
    if metrics.task == "chat" and metrics.base is not None:
        from pica.experiments.uncertainty import loss_change
        from pica.report.run_files import read_predictions

        told = read_predictions(result.output, metrics)
        print_sentences(console, loss_change(told["base"], told["adapter"]))
    print_sentences(console, f"{in_words(metric)} ± standard error{_brackets(metrics)}; {unit}; times are medians")
    if head := adapter.parameters.head:
        console.print(f"trainable: the adapter; beside it {head:,} parameters of the new head are trained")
    console.print()
    sizes = f"{adapter.file_bytes / 1024:.0f} KiB"
    console.print(f"Adapter:     {result.output / 'adapter'} ({sizes})", markup=False)
    console.print(f"Numbers:     {result.output / METRICS}, {result.output / CURVE}", markup=False)
    console.print(f"Predictions: {result.output / 'predictions-*.jsonl'}", markup=False)
    console.print(f"Recipe:      {result.output / 'recipe.resolved.yaml'}", markup=False)
    if metrics.task != "dreambooth":  # its page is written at once
        place = str(result.output / "report.html") if page else f"pica report {shlex.quote(str(result.output))}"
        console.print(f"One page:    {place}", markup=False)


def _print_pictures(result: "RunResult") -> None:
    """What is there to look at."""
    from pica.report.pictures_page import GRID, write_picture_page

    if (result.output / GRID).is_file():
        show(f"Pictures:    {result.output / GRID}, {result.output / 'pictures-*'}")
    show(f"Report:      {write_picture_page(result.output)}")


_SHOWN = 3  # prompts that are shown with both answers
_LONGEST = 240  # characters of a text in that table


def _print_answers(result: "RunResult", option: str) -> None:
    """A few held-out questions, answered without and with the adapter, and what can be done next; commands get `option`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from pica.cli.console import table_console

    answered = _answers(result.output)
    console = table_console()
    if answered:
        table = Table(box=box.SIMPLE, pad_edge=False, show_lines=True, width=min(80, console.width))
        columns = ["held-out question", "base model", "with the adapter"]
        for column in [name for at, name in enumerate(columns) if answered[0][at] is not None]:
            table.add_column(column, ratio=1, overflow="fold")
        for row in answered:
            table.add_row(*(Text(shortened(each, _LONGEST)) for each in row if each is not None))
        console.print()
        console.print(table)
    place = shlex.quote(str(result.output))
    console.print()
    console.print(f"Talk to it:  pica chat {place}{option}", markup=False)
    console.print(f"Merge it:    pica merge {place} -o merged{option}", markup=False)
    if result.metrics.adapter.method == "pica":
        console.print(f"Serve it:    pica export {place} -o lora --for vllm{option}", markup=False)


def _answers(folder: Path) -> list[tuple[str, str | None, str]]:
    """The first questions that were answered: what was asked, and the answers without (None: not asked) and with."""
    from pica.experiments.standings import predictions_file, read_rows

    adapted, before = read_rows(folder / predictions_file("adapter")), folder / predictions_file("base")
    base = read_rows(before) if before.is_file() else [{}] * len(adapted)
    answered = [pair for pair in zip(adapted, base) if "answer" in pair[0]][:_SHOWN]
    return [(_question(row), other.get("answer"), row["answer"]) for row, other in answered]


def _question(row: Mapping[str, Any]) -> str:
    """What was answered: the last message before an answer."""
    asked = row["prompt"] if "prompt" in row else row["messages"][:-1]
    return asked[-1]["content"]


def _scores(row: "Measurement") -> tuple[str, str]:
    from pica.experiments.evaluate.evaluation import shown_score

    return shown_score(row.metric, row.score, row.stderr, row.examples), f"{row.loss:.4f}"


def _change(metrics: "RunMetrics", name: str) -> str:
    """A further measure before and after."""
    from pica.experiments.evaluate.evaluation import shown_score

    titles = {kind: trained.title for kind, trained in metrics.trained.items()}
    return ", ".join(
        f"{shown_score(name, one.scores[name], one.scores[f'{name}_stderr'])} ({titles.get(kind, 'base model')})"
        for kind, one in metrics.models.items()
    )


def _brackets(metrics: "RunMetrics") -> str:
    """What brackets hold, if a score has them."""
    from pica.experiments.evaluate.evaluation import near_the_end

    rows = metrics.models.values()
    found = any(near_the_end(row.metric, row.score, row.examples) for row in rows)
    return " (in brackets the 95% interval, where few are right or wrong)" if found else ""
