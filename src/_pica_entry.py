"""Entry points of the `pica` command and of plug-ins for other programs.

They stand outside the package, because importing that registers the method, which needs torch. The command line says
beforehand that it is starting, and `pica --help` answers at once; a plug-in that nobody switched on costs nothing.
"""

import os
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


def vllm_plugin() -> None:
    """Entry point of `vllm.general_plugins`, called in every process of vLLM: does nothing without PICA_VLLM_ADAPTERS."""
    if os.environ.get("PICA_VLLM_ADAPTERS"):
        from pica.adapters.integrations.vllm import register

        register()


if __name__ == "__main__":
    sys.exit(main())
