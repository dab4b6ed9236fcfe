"""Entry point of the `pica` command.

It stands outside the package so that it can say, before the package is imported, that the command line is starting:
`import pica` then leaves out registering the method, which needs torch, and `pica --help` answers at once.
"""

import sys

starting = False


def main() -> int:
    """Run the command line on `sys.argv` and return its exit status."""
    global starting
    starting = True
    from pica.cli import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
