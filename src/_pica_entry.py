"""Entry point of the `pica` command.

It stands outside the package so that it can say, before the package is imported, that the command line is starting:
`import pica` then leaves out registering the method, which needs torch, and `pica --help` answers at once.
"""

import signal
import sys

starting = False


def main() -> int:
    """Run the command line on `sys.argv` and return its exit status."""
    global starting
    starting = True
    try:
        from pica.cli import main as run

        return run(sys.argv[1:])
    except KeyboardInterrupt:  # before the command line was there to take it, or once more while it said so
        sys.stderr.write("pica: Interrupted.\n")
        return 130
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left but to end


if __name__ == "__main__":
    sys.exit(main())
