"""Build the source distribution and the wheel, and hold what is in them against the repository.

The source distribution must have every file that git has, so that it can be tested as its README says; the wheel every
file of the package. Run it from the repository's root: python tools/check_packages.py
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

LEFT_OUT = {".gitignore"}


def main() -> int:
    """Build both, print what is missing, and return the exit status."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    with tempfile.TemporaryDirectory() as place:
        build = [sys.executable, "-m", "build", "--outdir", place, "."]
        built = subprocess.run(build, capture_output=True, text=True)
        if built.returncode:
            print(built.stdout, built.stderr, "The packages could not be built.")
            return 1
        with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
            source = {name.partition("/")[2] for name in archive.getnames()}
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as archive:
            wheel = set(archive.namelist())
    lacking = [f"source distribution: {name}" for name in sorted(set(listed) - source - LEFT_OUT)]
    package = {name.removeprefix("src/") for name in listed if name.startswith("src/")}
    lacking += [f"wheel: {name}" for name in sorted(package - wheel)]
    print("\n".join([*lacking, f"{len(listed)} files, {len(lacking)} of them lacking in what is built"]))
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
