"""Entry points of the `pica` command and of plug-ins for other programs.

They stand outside the package, because importing that registers the method, which needs torch. The command line says
beforehand that it is starting, and `pica --help` answers at once; a plug-in that nobody switched on costs nothing.
"""

import logging
import os
import signal
import sys

starting = False

# What these say when they are imported, as they are wherever they are installed, is of parts that they do without.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


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


def quiet_imports() -> None:
    """Keep back what libraries say as they are loaded; to be called before they are."""
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)


def vllm_plugin() -> None:
    """Entry point of `vllm.general_plugins`, called in every process of vLLM: does nothing without PICA_VLLM_ADAPTERS."""
    if os.environ.get("PICA_VLLM_ADAPTERS"):
        from pica.adapters.integrations.vllm import register

        register()


if __name__ == "__main__":
    sys.exit(main())
