"""What `pica analyze` leaves: a page, JSON, CSV, figures and suggested ranks; and the verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pica.experiments.analyze.analysis import NEAR_ZERO, PROGRESS, Analysis, Layer
from pica.experiments.analyze.summary import curve, near_zero, short_names, summarise
from pica.experiments.measuring import versions
from pica.experiments.results.analysis import (
    ANALYSIS,
    AnalysisResult,
    ChangedLayerResult,
    LayerResult,
    NearZero,
    RoleCurves,
    RoleResult,
    RoleSummary,
    Suggestion,
)
from pica.experiments.results.documents import result_document, to_document
from pica.experiments.results.screening import Screen
from pica.files import output as files
from pica.report import screening
from pica.report.analysis_figures import plates
from pica.report.page import Cell, Column, Page, bullets, csv_text, notice, preformatted, table

PAGE_FILE, LAYERS_FILE, ROLES_FILE, RANKS_FILE = (
    "report.html",
    "layers.csv",
    "roles.csv",
    "rank_pattern.yaml",
)
CURVE_POINTS = 64  # of each curve in the JSON file, spread evenly, beside all powers of two

_LAYER_COLUMNS = (
    *("path", "role", "index", "out", "in", "norm", "effective_rank", "stable_rank", "relative", "rank"),
    *("column", "chance", "random", "row", "row_chance", "minor", "best"),
    *("update_effective_rank", "update_stable_rank"),
    *("angle_mean_in", "angle_max_in", "angle_mean_out", "angle_max_out", "intruders_in", "intruders_out"),
    *("sine_in", "sine_out", "gap", "wedin_bound"),
    *("residual", "optimum", "misplaced", "epsilon", "theorem1_bound"),
)

_TITLES = {
    "name": ("role", "The layers' common path"),
    "layers": ("layers", "Layers that changed"),
    "shape": ("out × in", ""),
    "relative": ("change", "Frobenius norm of the update over that of the weight"),
    "column": ("column", "Share of the update's energy in the top-r column space, where PiCa's adapter lives"),
    "chance": ("chance", "What a random space of that size holds on average: r / in"),
    "random": ("random", "What seeded random directions held"),
    "row": ("row", "Share in the top-r row space"),
    "row_chance": ("chance (row)", "What a random space of that size holds of the output side: r / out"),
    "minor": ("minor", "Share in the last r directions of the column space"),
    "best": ("best", "Share in the update's own best r directions (Eckart and Young)"),
    "angle": ("angle", "Mean principal angle between the top-r column spaces before and after, degrees"),
    "largest_angle": ("largest angle", "Largest principal angle in any layer, degrees: the outermost direction turns most"),
    "intruders": ("intruders", "Leading directions after fine-tuning that resemble none before, per layer"),
    "residual_over_optimum": ("loss/optimum", "Theorem 1: what projection loses, over the least that any r directions lose"),
    "wedin_informative": ("Wedin says", "Share of all ranks at which the bound of Lemma 3.1 is below 1"),
    "base_effective_rank": ("eff. rank W", "Effective rank of the base weight"),
    "base_stable_rank": ("stable rank W", "Stable rank of the base weight"),
    "update_effective_rank": ("eff. rank dW", "Effective rank of the update"),
    "update_stable_rank": ("stable rank dW", "Stable rank of the update"),
    "suggested": ("rank", "Suggested rank"),
}  # fmt: skip


def rows_of(analysis: Analysis, suggestion: Suggestion | None = None) -> list[dict[str, Any]]:
    """One row a role, for tables: `RoleSummary` with a short name and shape."""
    summaries = summarise(analysis)
    names = short_names([s.role for s in summaries])
    rows = []
    for s in summaries:
        row = {**asdict(s), "name": names[s.role], "shape": f"{s.out}×{s.inn}"}
        if suggestion is not None:
            rank = suggestion.ranks.get(s.role)
            row["suggested"] = (
                rank if rank is not None or s.role not in suggestion.ranks else f">{suggestion.limits[s.role]}"
            )
        rows.append(row)
    return rows


def console_table(analysis: Analysis, suggestion: Suggestion | None = None) -> str:
    """The table per role as plain text."""
    keys = ["name", "layers", "shape"]
    if analysis.paired:
        keys += ["relative", "column", "chance", "row", "row_chance", "minor", "best", "angle", "intruders"]
    else:
        keys += ["base_effective_rank", "base_stable_rank"]
    keys += ["suggested"] if suggestion is not None else []
    lines = [[_TITLES[key][0] for key in keys]]
    lines += [[_shown(key, row[key]) for key in keys] for row in rows_of(analysis, suggestion)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key in ("column", "chance", "random", "row", "row_chance", "minor", "best", "wedin_informative"):
        return f"{value:.1%}"
    if key == "relative":
        return f"{value:.2%}"
    if key in ("angle", "largest_angle", "residual_over_optimum"):
        return f"{value:.2f}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


_INSIDE = 0.9999  # of the update's energy: beyond what any training leaves by itself


def confinement(analysis: Analysis) -> str:
    """Why shares of the column space are no finding: the update was trained inside a space made of W0; "" if it was not."""
    # Of an adapter its configuration tells; of whole models (one that such an adapter was merged into) the numbers do: in
    # every role at most half of the input's directions hold all of the update.
    if analysis.confined:
        return (
            f"No finding: this adapter's update was trained inside {analysis.confined}. Its shares there, and what "
            "projection loses, follow from the method and would be the same for any task; they say nothing about where "
            "fine-tuning goes. Analyse a full fine-tune for that."
        )
    roles = {
        role: changed for role, layers in analysis.roles().items() if (changed := [la for la in layers if la.changed])
    }
    if not roles:
        return ""
    ranks = [1 + int((curve(layers, "column") < _INSIDE).sum()) for layers in roles.values()]
    if all(rank <= layers[0].inn // 2 for rank, layers in zip(ranks, roles.values())):
        return (
            f"No finding: the top {max(ranks)} directions of the column space hold all of the update, which no full "
            "fine-tune does by itself: it was trained inside them, as PiCa does. The shares below follow from that and say "
            "nothing about where fine-tuning goes."
        )
    return ""


def verdict(analysis: Analysis) -> list[str]:
    """What holds of the paper's claims in this pair of models, one sentence each, with the numbers."""
    # Of an update that was trained inside a space made of W0, the questions that its method answers beforehand are left out.
    rows = [s for s in summarise(analysis) if s.column is not None]
    if not rows:
        return []
    names = short_names([s.role for s in rows])
    rank = max(s.rank or 0 for s in rows)
    angles = [s.angle or 0.0 for s in rows]
    widest = max(s.largest_angle or 0.0 for s in rows)
    intruders = sum(len(la.update["intruders"]["in"]) for la in analysis.layers if la.update and la.changed)
    wedin = sum((s.wedin_informative or 0.0) * s.layers for s in rows) / sum(s.layers for s in rows)
    advantage = sorted(rows, key=lambda s: (s.column or 0.0) / (s.chance or 1.0))
    low, high = advantage[0], advantage[-1]
    above = sum((s.column or 0) > 1.5 * (s.chance or 1) for s in rows)
    ratios = [s.residual_over_optimum for s in rows if s.residual_over_optimum is not None]
    near, expected = near_zero(analysis)
    found = [
        f"Does the top-{rank} column space stay where it was? Its mean principal angle is {min(angles):.2g} to "
        f"{max(angles):.2g} degrees by role (single directions at its edge turn by up to {widest:.0f}); {intruders} of the "
        "leading directions "
        f"{'is an intruder' if intruders == 1 else 'are intruders'}. Lemma 3.1 says so beforehand at {wedin:.1%} of all "
        "ranks; elsewhere the gap between neighbouring singular values is smaller than the update, and its bound excludes "
        "nothing.",
    ]
    if inside := confinement(analysis):
        return [inside, *found]
    found += [
        f"Does the update lie in it? It holds {_times(low)} what chance gives in {names[low.role]} ({low.column:.1%} of the "
        f"energy) and {_times(high)} in {names[high.role]} ({high.column:.1%}); {above} of {len(rows)} roles hold more than "
        "one and a half times chance.",
    ]
    if ratios:
        found.append(
            f"Is the projection near the best rank-{rank} approximation (Theorem 1)? By role it loses {min(ratios):.1f} to "
            f"{max(ratios):.1f} times as much energy."
        )
    found.append(
        f"Are the entries of E_P and E_Q near zero (Figure 2)? {near:.2%} are below {NEAR_ZERO}; of two unrelated weights "
        f"of these shapes {expected:.2%} would be."
    )
    return found


def _times(s: RoleSummary) -> str:
    return f"{(s.column or 0.0) / (s.chance or 1.0):.2f} times"


def write(
    analysis: Analysis,
    folder: Path,
    *,
    suggestion: Suggestion | None = None,
    recipe: str | None = None,
    screen: Screen | None = None,
) -> list[Path]:
    """Write everything into `folder` and remove the progress file; each file appears whole, and ANALYSIS last.

    Returns:
        The files.
    Raises:
        OutputError: The folder cannot be written.
    """
    result = result_of(analysis, suggestion, screen)
    data = files.json_text(result_document(result), indent=1) + "\n"
    layers = csv_text([to_document(layer) for layer in result.layers], _LAYER_COLUMNS)
    roles = csv_text([asdict(s) for s in summarise(analysis)], [field.name for field in fields(RoleSummary)])
    written = page(analysis, suggestion, recipe, layers, roles, screen)
    texts = {LAYERS_FILE: layers, ROLES_FILE: roles, PAGE_FILE: written}
    if recipe is not None:
        texts[RANKS_FILE] = recipe
    for name, text in texts.items():
        files.write_text(folder / name, text)
    with files.translated_write_errors(folder), files.atomic_folder(folder / "figures") as partial:
        for plate in plates(analysis):
            plate.save(partial)
    files.write_text(folder / ANALYSIS, data)  # last: it marks a finished analysis
    (folder / PROGRESS).unlink(missing_ok=True)
    return [folder / name for name in (ANALYSIS, *texts, "figures")]


def page(
    analysis: Analysis,
    suggestion: Suggestion | None,
    recipe: str | None,
    layers: str,
    roles: str,
    screen: Screen | None = None,
) -> str:
    """The HTML page."""
    settings = analysis.settings
    ranks = [la.update["rank"] for la in analysis.layers if la.update and la.changed]
    facts: dict[str, object] = {"base model": settings.base}
    if analysis.paired:
        facts |= {"fine-tuned": settings.tuned, "r": max(ranks)}
    facts["layers"] = len(analysis.layers)
    title, lead = "Spectra of the base weights", "What can be said before any fine-tuning."
    if analysis.paired:
        title, lead = "Where did fine-tuning move the weights?", "The claims of the PiCa paper held against two models."
    inside = confinement(analysis) if analysis.paired else ""
    if inside:
        lead = "An update that was trained inside a space made of the base weights."
    made = Page(title, lead=lead, facts=facts)
    if analysis.paired:
        found = [sentence for sentence in verdict(analysis) if sentence != inside]
        warnings = [notice(inside, "warning")] if inside else []
        made.section("What holds", *warnings, bullets(found), *[notice(note) for note in analysis.notes])
    rows = rows_of(analysis, suggestion)
    made.section("By role", *_tables(analysis, rows, suggestion))
    if suggestion is not None and recipe is not None:
        made.section(
            "Suggested ranks",
            f"The smallest rank of each role that holds {suggestion.share:.0%} "
            + (
                "of the update's energy in the base weight's column space."
                if suggestion.source == "update"
                else "of the base weight's squared singular values; no task was looked at."
            ),
            preformatted(recipe),
        )
        made.download(RANKS_FILE, recipe, kind="text/yaml")
    if screen is not None:
        made.section("A screen of bases", *screening.blocks(screen))
    titles = {
        "energy": "Energy captured",
        "angles": "Angles",
        "perturbations": "Perturbations",
        "spectra": "Singular values",
    }
    for plate in plates(analysis):
        made.section(titles[plate.name], plate.inline())
    made.download(LAYERS_FILE, layers, kind="text/csv")
    made.download(ROLES_FILE, roles, kind="text/csv")
    return made.html()


def _tables(analysis: Analysis, rows: Sequence[Mapping[str, Any]], suggestion: Suggestion | None) -> list[Any]:
    more = ["suggested"] if suggestion is not None else []
    if not analysis.paired:
        return [
            _table(rows, ["name", "layers", "shape", "base_effective_rank", "base_stable_rank", *more], "Base weights.")
        ]
    first = [
        "name",
        "layers",
        "shape",
        "relative",
        "column",
        "chance",
        "random",
        "row",
        "row_chance",
        "minor",
        "best",
        *more,
    ]
    second = ["name", "angle", "largest_angle", "intruders", "residual_over_optimum", "wedin_informative"]
    second += ["base_effective_rank", "base_stable_rank", "update_effective_rank", "update_stable_rank"]
    return [
        _table(rows, first, "Share of the update's energy that r directions hold."),
        _table(rows, second, "Angles, bounds and ranks."),
    ]


def _table(rows: Sequence[Mapping[str, Any]], keys: list[str], caption: str) -> Any:
    columns = [Column(key, *_TITLES[key], numeric=key not in ("name", "shape")) for key in keys]
    cells = []
    for row in rows:
        shown = {}
        for key in keys:
            value = row[key]
            shown[key] = Cell(_shown(key, value), value if isinstance(value, (int, float)) else _shown(key, value))
        cells.append(shown)
    return table(columns, cells, caption=caption)


def layer_results(analysis: Analysis) -> list[LayerResult]:
    """What was found of each layer by itself."""
    return [_layer_result(layer) for layer in analysis.layers]


def _layer_result(layer: Layer) -> LayerResult:
    head: dict[str, Any] = {
        "path": layer.path,
        "role": layer.role,
        "index": layer.index,
        "out": layer.out,
        "inn": layer.inn,
        "norm": layer.norm,
        "effective_rank": layer.effective_rank,
        "stable_rank": layer.stable_rank,
    }
    u = layer.update
    if u is None or not layer.changed:
        return LayerResult(**head)
    rank, wedin, theorem = u["rank"], u["wedin"], u["theorem1"]
    shares = {kind: float(curve([layer], kind)[rank - 1]) for kind in ("column", "random", "row", "minor", "best")}
    sides: dict[str, Any] = {}
    for side in ("in", "out"):
        sides[f"angle_mean_{side}"] = u["angle_mean"][side]
        sides[f"angle_max_{side}"] = u["angle_max"][side]
        sides[f"intruders_{side}"] = len(u["intruders"][side])
    return ChangedLayerResult(
        **head,
        **shares,
        relative=u["energy"] ** 0.5 / layer.norm if layer.norm else None,
        rank=rank,
        chance=rank / layer.inn,
        row_chance=rank / layer.out,
        update_effective_rank=u["effective_rank"],
        update_stable_rank=u["stable_rank"],
        **{name: wedin[name] for name in ("sine_in", "sine_out", "gap")},
        wedin_bound=wedin["bound"],
        **{name: theorem[name] for name in ("residual", "optimum", "misplaced", "epsilon")},
        theorem1_bound=theorem["bound"],
        **sides,
    )


def result_of(analysis: Analysis, suggestion: Suggestion | None = None, screen: Screen | None = None) -> AnalysisResult:
    """What an analysis found, without the spectra that its figures are drawn from."""
    roles = []
    for summary, layers in zip(summarise(analysis), analysis.roles().values()):
        roles.append(RoleResult(**asdict(summary), curves=_curves(layers) if summary.column is not None else None))
    near, expected = near_zero(analysis) if analysis.paired else (None, None)
    return AnalysisResult(
        settings=analysis.settings,
        versions=versions(),
        notes=analysis.notes,
        verdict=verdict(analysis),
        confined=confinement(analysis) or None,
        near_zero_entries=NearZero(threshold=NEAR_ZERO, measured=near, unrelated=expected),
        suggestion=suggestion,
        roles=roles,
        layers=layer_results(analysis),
        screen=screen,
    )


def _curves(layers: Sequence[Layer]) -> RoleCurves:
    kinds = {kind: curve(layers, kind) for kind in ("column", "row", "minor", "random", "best")}
    shortest = min(map(len, kinds.values()))
    points = min(CURVE_POINTS, shortest)
    spread = {1 + round(i * (shortest - 1) / max(1, points - 1)) for i in range(points)}
    ranks = sorted(spread | {2**i for i in range(shortest.bit_length())})  # of which the last is at most `shortest`
    return RoleCurves(r=ranks, **{kind: [round(float(v[r - 1]), 6) for r in ranks] for kind, v in kinds.items()})
