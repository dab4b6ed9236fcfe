"""`pica analyze`: where did fine-tuning move the weights, and what of the paper's claims holds there?"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pica.files.place import Place

from pica.cli.options import add_screen, check_screen, command_parser, whole
from pica.cli.show import show

EPILOG = """examples:
  pica analyze ./base ./fine-tuned                      a table by role; page, figures, JSON and CSV in pica-analysis
  pica analyze ./base out/adapter --rank 64             the adapter may be of any PEFT method that can be merged
  pica analyze ./base ./fine-tuned --suggest-rank 0.9   smallest ranks whose column space holds 90% of the update
  pica analyze ./base --suggest-rank 0.9                from the spectra of the base weights alone
  pica analyze embedded --only q_proj
  pica analyze ./base --screen train.jsonl --calibration train.jsonl       a screen of bases on a first gradient

Weights are read one at a time, never two models; --screen alone loads the base model. An interrupted analysis goes on
when the command is given again.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "analyze",
        "Hold the paper's claims against a pair of models: how far the update of each linear layer lies in the "
        "column space of its base weight, and whether that space stayed where it was.",
        EPILOG,
    )
    made.add_argument(
        "base", metavar="BASE", help="base model: a folder with safetensors files, a hub name, or embedded"
    )
    made.add_argument(
        "tuned", metavar="FINETUNED", nargs="?", help="fine-tuned model or adapter; without it, only the base's spectra"
    )
    made.add_argument("-o", "--output", metavar="DIR", type=Path, default=Path("pica-analysis"), help="folder to write")
    made.add_argument(
        "--rank", type=whole, default=32, metavar="R", help="rank of shares, angles and bounds (default: 32)"
    )
    made.add_argument("--only", metavar="REGEX", help="only layers whose path it is found in")
    made.add_argument(
        "--suggest-rank", type=float, metavar="SHARE", help="write ranks for a recipe that hold this share, e.g. 0.9"
    )
    made.add_argument(
        "--intruder-threshold", type=float, default=0.5, metavar="C", help="cosine below which one is an intruder (0.5)"
    )
    made.add_argument(
        "--intruder-top", type=whole, default=10, metavar="K", help="leading directions asked for intruders (10)"
    )
    made.add_argument("--seed", type=whole, default=0, help="of the random directions (default: 0)")
    add_screen(made)
    made.add_argument("--overwrite", action="store_true", help="replace an analysis in DIR")
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, analyse, write everything, and print the table and what holds."""
    given = parser().parse_intermixed_args(arguments)  # FINETUNED may also stand behind an option

    from pica.cli.console import loading

    with loading() as shown:
        from pica.errors import ConfigError
        from pica.experiments.analyze.analysis import analyse, check
        from pica.experiments.analyze.ranks import recipe_text, suggest
        from pica.experiments.analyze.weights import linear_weights, open_folder
        from pica.experiments.recipes.recipe import ModelSection
        from pica.experiments.results.analysis import Settings
        from pica.experiments.screening import ScreenQuestion, screen
        from pica.files import output as files
        from pica.report import screening
        from pica.report.analysis_report import console_table, verdict, write
    settings = Settings(
        given.base,
        given.tuned,
        given.rank,
        given.only,
        given.intruder_threshold,
        given.intruder_top,
        given.seed,
    )
    check(settings)
    if given.suggest_rank is not None and not 0 < given.suggest_rank <= 1:
        raise ConfigError(f"--suggest-rank {given.suggest_rank} must lie above 0 and be at most 1, for instance 0.9.")
    check_screen(given.screen, given.calibration)
    question = ScreenQuestion(
        ModelSection(path=given.base), given.screen, given.calibration, given.rank, "all-linear", given.only, given.seed
    )
    folder = given.output.expanduser()
    try:
        with files.claimed(folder):
            place = _place(folder, overwrite=given.overwrite)
            screened = screen(question) if given.screen is not None else None
            analysis = analyse(settings, place.folder, reporter=shown, replace=given.overwrite)
            suggestion = recipe = None
            if given.suggest_rank is not None:
                suggestion = suggest(analysis, given.suggest_rank)
                paths = [target.path for target in linear_weights(open_folder(given.base))]
                recipe = recipe_text(analysis, suggestion, paths)
            with shown.console.status("Drawing"):
                written = write(analysis, place.folder, suggestion=suggestion, recipe=recipe, screen=screened)
            place.done()
    except KeyboardInterrupt:
        shown.say(f"Interrupted; what was measured is kept in {folder}. The same command goes on from there.")
        return 130
    show(console_table(analysis, suggestion))
    for sentence in (*verdict(analysis), *analysis.notes):
        show(f"\n{sentence}")
    if screened is not None:
        show(f"\n{screening.as_text(screened)}")
    show()
    for path in written:
        show(folder / path.name)
    return 0


def _place(folder: Path, *, overwrite: bool) -> "Place":
    """Where to write, if the folder may be written to."""
    from pica.errors import OutputError
    from pica.experiments.analyze.analysis import PROGRESS
    from pica.experiments.results.analysis import ANALYSIS
    from pica.files import output as files
    from pica.files.place import Place

    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{str(folder)!r} is a file; choose a folder with --output.")
    place = Place(folder, ANALYSIS)
    finished = (folder / ANALYSIS).is_file()
    if not files.is_empty(folder) and not finished and not (folder / PROGRESS).is_file():
        raise OutputError(f"{str(folder)!r} is not empty and holds no analysis; choose another folder with --output.")
    if finished and not overwrite:
        raise OutputError(f"{str(folder)!r} holds an analysis; choose another folder, or replace it with --overwrite.")
    place.check(overwrite=True)  # what was begun to replace it goes on
    return place
