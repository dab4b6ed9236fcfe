"""Declared versions are the tested ones: pyproject.toml, the constraint files and the check on import say the same."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import peft
import pytest
import transformers

from pica import _versions
from pica._versions import HOSTS, declared, fits
from pica.cli import main
from pica.errors import PicaError, VersionError

ROOT = Path(__file__).parents[1]


def requirements() -> dict[str, str]:
    """Package name -> the range that pyproject.toml declares for it, the core tests' own packages included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["cli"], *extras["core-test"]]
    lines = [line for line in lines if not line.startswith("pica-peft[")]
    found = [re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?([<>=].+)", line) for line in lines]
    assert all(found), lines
    return {match[1]: match[2] for match in found if match}


def pins(name: str) -> dict[str, str]:
    """Package name -> version of a constraints file."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", package).lower(): pin for package, pin in (line.split("==") for line in lines)}


def numbers(version: str) -> list[int]:
    """The numbers of a version without the zeros at its end, which mean nothing."""
    found = [int(part) for part in version.split(".")]
    while found and not found[-1]:
        found.pop()
    return found


def test_the_check_on_import_has_the_ranges_that_pip_is_told():
    wanted = requirements()
    assert {name: wanted[name] for name in HOSTS} == {name: declared(name) for name in HOSTS}
    assert {name for name, range_ in wanted.items() if "<" in range_} == set(HOSTS)


def test_the_lowest_versions_tested_are_the_lowest_declared():
    tested = pins("constraints-lowest.txt")
    for name, range_ in requirements().items():
        lowest = range_.split(",")[0].removeprefix(">=")
        assert numbers(tested[name]) == numbers(lowest), name


def test_the_highest_versions_tested_are_the_last_below_the_bounds():
    tested = pins("constraints-highest.txt")
    assert set(tested) == set(HOSTS)
    for name, version in tested.items():
        major, minor, *_ = numbers(version)
        assert fits(name, version)
        assert not fits(name, f"{major}.{minor + 1}"), f"no test of {name} {major}.{minor + 1}, which is declared"


def test_the_constraints_that_users_are_told_of_are_in_the_ranges():
    tested = pins("constraints.txt")
    for name, range_ in requirements().items():
        assert numbers(tested[name].split("+")[0].split(".post")[0]) >= numbers(range_.split(",")[0][2:]), name
    assert all(fits(name, tested[name]) for name in HOSTS)


def test_the_python_versions_declared_are_the_tested_ones():
    """The two that .ci/run makes environments with: pyproject.toml names them, and lint and types take the older one."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(settings["project"]["classifiers"]))
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    assert named, "no Python is declared"
    assert settings["project"]["requires-python"] == f">={named[0]}"
    assert settings["tool"]["pyright"]["pythonVersion"] == named[0]
    assert settings["tool"]["ruff"]["target-version"] == "py" + named[0].replace(".", "")
    for version in named:
        assert f"python{version}" in script or f"python_of {version}" in script
        assert version in readme.partition("\nRequires Python")[2].split("\n\n")[0]


def test_the_readme_names_the_ranges():
    text = " ".join((ROOT / "README.md").read_text().partition("\nRequires Python")[2].split("\n\n")[0].split())
    for name, host in {"torch": "PyTorch", "peft": "PEFT", "transformers": "transformers"}.items():
        lowest, highest = HOSTS[name][0], ".".join(pins("constraints-highest.txt")[name].split(".")[:2])
        assert re.search(rf"{host} {re.escape(lowest)}\b[^,]* {re.escape(highest)}\b", text), name


@pytest.mark.parametrize(
    ("name", "version", "wanted"),
    [
        ("transformers", "5.5.4", False),
        ("transformers", "5.6.0", True),
        ("transformers", "5.23.9", True),
        ("transformers", "5.24.0.dev0", False),
        ("transformers", "6.0", False),
        ("torch", "2.13.0+cpu", True),
        ("torch", "2.7.0a0+79aa17489c.nv25.04", True),
        ("torch", "2.5.1", False),
        ("peft", "0.21.1", False),
        ("peft", "0.21.10", True),
        ("peft", None, True),
        ("peft", "unknown", True),
    ],
)
def test_fits(name: str, version: str | None, wanted: bool):
    assert fits(name, version) is wanted


@pytest.fixture
def older(tmp_path: Path) -> dict[str, str]:
    """An environment in which pip's records say transformers 5.5.4 and PEFT 0.20.0."""
    for name, version in (("transformers", "5.5.4"), ("peft", "0.20.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    places = [str(tmp_path), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}


def python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_import_refuses_a_version_outside_in_one_sentence_and_before_torch(older: dict[str, str]):
    code = "import sys\ntry:\n import pica\nexcept ImportError as e:\n print(e)\nassert 'torch' not in sys.modules"
    found = python(code, older)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("\n") == 1
    for part in (
        "peft 0.20.0 and transformers 5.5.4 are installed",
        f"peft{declared('peft')} and transformers{declared('transformers')} only",
        f"pip install 'peft{declared('peft')}' 'transformers{declared('transformers')}'",
    ):
        assert part in found.stdout


def test_every_command_refuses_it(older: dict[str, str]):
    enter = "import sys, _pica_entry\nsys.argv = ['pica', *{!r}]\nsys.exit(_pica_entry.main())"
    for command in ("train", "plan", "verify"):
        refused = python(enter.format([command, "x"]), older)
        assert refused.returncode == 2
        assert refused.stderr.startswith("pica: error: peft 0.20.0 and transformers 5.5.4 are installed, ")
        assert refused.stderr.count("\n") == 1
    assert python(enter.format(["plan", "--help"]), older).returncode == 0


def test_env_shows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(transformers, "__version__", "5.5.4")
    assert main(["env", "--json"]) == 0
    ranges = json.loads(capsys.readouterr().out)["ranges"]
    assert ranges["transformers"] == {"declared": declared("transformers"), "fits": False}
    assert ranges["torch"] == {"declared": declared("torch"), "fits": True}
    assert main(["env"]) == 0
    assert f"transformers:      {declared('transformers')} (the installed version is outside" in capsys.readouterr().out


def test_what_is_imported_counts_before_what_pip_remembers(monkeypatch: pytest.MonkeyPatch):
    """A checkout of PEFT on the path, beside an installed one."""
    _versions.check_hosts.cache_clear()
    _versions.check_hosts()
    _versions.check_hosts.cache_clear()
    monkeypatch.setattr(peft, "__version__", "0.22.0.dev0")
    with pytest.raises(VersionError, match=r"peft 0\.22\.0\.dev0 is installed") as refused:
        _versions.check_hosts()
    assert isinstance(refused.value, PicaError)
