"""What runs, comparisons, plans and analyses found, as dataclasses, and the one way to write them to files and read them.

    metrics = read_result(RunMetrics, folder / METRICS)
    metrics.adapter.score, metrics.models["base"].loss
    write_result(folder / METRICS, metrics)

A key of a file is spelt here and nowhere else. Each file of results has a JSON schema in `pica/assets/schemas`, made from
the dataclasses by tools/write_schemas.py.
"""

from pica.experiments.results.analysis import AnalysisResult
from pica.experiments.results.comparison import CellIndex, ComparisonResult, DoneCell, FailedCell
from pica.experiments.results.documents import Result
from pica.experiments.results.plan import Estimate
from pica.experiments.results.run import RunMetrics

FILES: dict[str, type[Result]] = {
    "metrics": RunMetrics,
    "cell": DoneCell,
    "failed-cell": FailedCell,
    "cells": CellIndex,
    "comparison": ComparisonResult,
    "plan": Estimate,
    "analysis": AnalysisResult,
}
"""What is written as a document of its own, by the name of its schema."""
