"""Run the tests that PEFT ships in its source distribution against PiCa, with tiny local models.

    python tools/run_peft_tests.py                       all of them (about four minutes on two cores)
    python tools/run_peft_tests.py --quick               the broadest files (about two minutes)
    python tools/run_peft_tests.py --method svft         against SVFT instead
    python tools/run_peft_tests.py --sdist peft-0.21.2.tar.gz --json report.json
    python tools/run_peft_tests.py --write-docs          also write docs/peft-tests.md

Needs the packages of the `test` extra, and pip to fetch the source distribution unless `--sdist` names one. The exit
status is 0 if every test passed that `peft_suite/exclusions.py` does not list.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from peft_suite.cases import FILES
from peft_suite.exclusions import OTHER_FILES
from peft_suite.models import build_hub
from peft_suite.report import Report, markdown, summary
from peft_suite.rows import METHOD_VARIABLE

ROOT = Path(__file__).resolve().parent.parent
# PEFT's own settings turn deprecation warnings of transformers into errors, and so fail with versions newer than it.
PYTEST_INI = "[pytest]\nmarkers =\n    single_gpu_tests\n    multi_gpu_tests\n    regression\n    bitsandbytes\n"


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    sdist = args.sdist or _download(args.peft_version, args.cache_dir)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pica-peft-tests-") as temporary:
        folder = Path(temporary)
        suite = _extract(sdist, folder)
        _check_files(suite)
        print(f"Building tiny models in {folder} ...")
        build_hub(folder / "hub")
        files = [name for name, plan in FILES.items() if (plan.quick or not args.quick) and (suite / name).exists()]
        outcomes = _run(suite, files, folder, args.keyword, args.method)
    report = Report.from_outcomes(
        outcomes,
        peft=sdist.name.removeprefix("peft-").removesuffix(".tar.gz"),
        seconds=time.monotonic() - started,
        method={"pica": "PiCa", "svft": "SVFT"}[args.method],
    )
    print(summary(report))
    if args.json:
        args.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
        print(f"Report: {args.json}")
    if args.write_docs:
        target = ROOT / "docs" / "peft-tests.md"
        target.write_text(markdown(report))
        print(f"Wrote {target}")
    return 0 if report.passed and not report.failed else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft-version", default=version("peft"), help="default: the installed one (%(default)s)")
    parser.add_argument("--sdist", type=Path, help="a source distribution that is already here")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "pica" / "peft-sdist")
    parser.add_argument("--method", choices=("pica", "svft"), default="pica", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="run only the broadest files")
    parser.add_argument("-k", dest="keyword", help="pytest's -k: only tests whose name matches")
    parser.add_argument("--json", type=Path, help="write a report with every test's outcome")
    parser.add_argument("--write-docs", action="store_true", help="write docs/peft-tests.md")
    args = parser.parse_args(argv)
    if args.write_docs and (args.quick or args.keyword):
        parser.error("--write-docs needs a full run: leave out --quick and -k")
    if args.write_docs and args.method != "pica":
        parser.error("--write-docs writes the page about PiCa: leave out --method")
    if args.sdist and not args.sdist.is_file():
        parser.error(f"--sdist: there is no file {args.sdist}")
    return args


def _download(peft_version: str, cache_dir: Path) -> Path:
    sdist = cache_dir / f"peft-{peft_version}.tar.gz"
    if not sdist.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(cache_dir), f"peft=={peft_version}"], check=True)
    return sdist


def _extract(sdist: Path, folder: Path) -> Path:
    """Unpack the tests alone, so that they meet the installed PEFT and not the sources beside them."""
    with tarfile.open(sdist) as archive:
        members = [m for m in archive.getmembers() if Path(m.name).parts[1:2] == ("tests",)]
        if not members:
            raise SystemExit(f"{sdist} holds no folder tests/.")
        archive.extractall(folder, members=members, filter="data")
        suite = folder / Path(members[0].name).parts[0] / "tests"
    (suite / "__init__.py").touch()  # the distribution leaves it out, and the tests import each other relatively
    (suite.parent / "pytest.ini").write_text(PYTEST_INI)
    return suite


def _check_files(suite: Path) -> None:
    unknown = sorted(p.name for p in suite.glob("test_*.py") if p.name not in FILES and p.name not in OTHER_FILES)
    if unknown:
        raise SystemExit(
            f"This PEFT has test files that the suite does not know: {', '.join(unknown)}. "
            "Add each to FILES (peft_suite/cases.py) or to OTHER_FILES (peft_suite/exclusions.py)."
        )


def _run(suite: Path, files: list[str], folder: Path, keyword: str | None, method: str) -> dict[str, dict[str, str]]:
    outcomes = folder / "outcomes.json"
    environment = {
        **os.environ,
        "PICA_ALLOW_TORCH_FILES": "1",  # some tests save pickled weights on purpose
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
        "PICA_PEFT_TESTS_JSON": str(outcomes),
        METHOD_VARIABLE: method,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # the models are tiny: more threads cost more than they give
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-p", "peft_suite.plugin", "-p", "no:cacheprovider"]
    command += ["-q", "--no-header", "--disable-warnings", "--tb=short", *(f"tests/{name}" for name in files)]
    if keyword:
        command += ["-k", keyword]
    subprocess.run(command, cwd=suite.parent, env=environment, check=False)
    if not outcomes.exists():
        raise SystemExit("pytest did not get as far as running tests; see its output above.")
    return json.loads(outcomes.read_text())


if __name__ == "__main__":
    sys.exit(main())
