"""What a run of PEFT's tests says: a summary for the terminal, a report as JSON, and the page in docs/."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .cases import FILES
from .exclusions import EXCLUSIONS, OTHER_FILES

OUTCOMES = ("passed", "failed", "skipped", "deselected")


@dataclass(frozen=True)
class Report:
    """Outcome and detail of each test (`file::test`), and the circumstances."""

    tests: dict[str, dict[str, str]]
    peft: str
    seconds: float
    method: str

    @classmethod
    def from_outcomes(cls, outcomes: dict[str, dict[str, str]], peft: str, seconds: float, method: str) -> Report:
        return cls({k.removeprefix("tests/"): v for k, v in outcomes.items()}, peft, seconds, method)

    def count(self, outcome: str, file: str | None = None) -> int:
        return sum(t["outcome"] == outcome and (file is None or _file(k) == file) for k, t in self.tests.items())

    @property
    def passed(self) -> int:
        return self.count("passed")

    @property
    def failed(self) -> int:
        return self.count("failed")

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(_file(k) for k in self.tests))

    def reasons(self, outcome: str) -> list[tuple[str, str, int]]:
        """(file, reason, number of tests) for each reason of an outcome."""
        counts = Counter((_file(k), t["detail"]) for k, t in self.tests.items() if t["outcome"] == outcome)
        return [(file, reason, n) for (file, reason), n in counts.items()]

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "peft": self.peft,
            "seconds": round(self.seconds, 1),
            "counts": {o: self.count(o) for o in OUTCOMES},
            "files": {f: {o: self.count(o, f) for o in OUTCOMES} for f in self.files},
            "not_run_files": OTHER_FILES,
            "exclusions": EXCLUSIONS,
            "tests": self.tests,
        }


def _file(test: str) -> str:
    return test.partition("::")[0]


def summary(report: Report) -> str:
    """A table for the terminal, then every failure."""
    rows = [("file", *OUTCOMES)]
    rows += [(f, *(str(report.count(o, f)) for o in OUTCOMES)) for f in report.files]
    rows.append(("total", *(str(report.count(o)) for o in OUTCOMES)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["", f"PEFT {report.peft}'s tests against {report.method}, {report.seconds:.0f} s"]
    for row in rows:
        lines.append("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]))
    lines += [f"FAILED {name}: {t['detail']}" for name, t in report.tests.items() if t["outcome"] == "failed"]
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The page docs/peft-tests.md."""
    ran = report.passed + report.failed
    lines = [
        "# PEFT's own tests, run against PiCa",
        "",
        "PEFT ships its tests in its source distribution. `tools/run_peft_tests.py` runs those that apply to any method",
        "against `PicaConfig`: it puts PiCa's rows into their case tables, and PiCa into the place of LoRA where a test",
        "takes LoRA as an example of any method. The Hub models they ask for are tiny models of the same architectures",
        "with random weights, built locally; nothing is downloaded but the source distribution.",
        "",
        "    python tools/run_peft_tests.py            # all",
        "    python tools/run_peft_tests.py --quick    # the broadest files",
        "    python tools/run_peft_tests.py --sdist peft-VERSION.tar.gz --json report.json",
        "",
        "The exit status is 0 if every test passed that is not listed below. This page is written by the same script",
        "(`--write-docs`) from the run and from its own lists.",
        "",
        f"## Result with PEFT {report.peft}",
        "",
        f"{report.passed} of {ran} tests that were run passed"
        + (f", {report.failed} failed." if report.failed else "."),
        "",
        '"Skipped" are tests that skip themselves for a method like PiCa; "not run" are tests of the same file that are',
        "about other methods, or that are listed below.",
        "",
        "| file | passed | failed | skipped | not run |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [f"| `{f}` | " + " | ".join(str(report.count(o, f)) for o in OUTCOMES) + " |" for f in [*report.files]]
    lines.append("| total | " + " | ".join(str(report.count(o)) for o in OUTCOMES) + " |")
    lines += ["", "## Tests that would apply but are left out", "", "| test | reason |", "|---|---|"]
    lines += [f"| `{_readable(pattern)}` | {reason} |" for pattern, reason in EXCLUSIONS.items()]
    lines += ["", "## The other tests of these files", "", "| file | tests not run | reason |", "|---|---:|---|"]
    for file, reason, count in report.reasons("deselected"):
        if file in FILES and reason == FILES[file].rest:
            lines.append(f"| `{file}` | {count} | {reason} |")
    lines += ["", "## Tests that skip themselves", "", "| file | tests | PEFT's reason |", "|---|---:|---|"]
    lines += [f"| `{f}` | {n} | {_plain(reason)} |" for f, reason, n in report.reasons("skipped")]
    lines += ["", "## Files that are not run", "", "| file | what it is about |", "|---|---|"]
    lines += [f"| `{file}` | {reason} |" for file, reason in OTHER_FILES.items()]
    return "\n".join(lines) + "\n"


def _readable(pattern: str) -> str:
    return pattern.replace("[[]", "[")


def _plain(reason: str) -> str:
    return (
        reason.replace("<class 'pica.tuners.pica.config.PicaConfig'>", "PicaConfig").replace("|", "\\|").split("\n")[0]
    )
