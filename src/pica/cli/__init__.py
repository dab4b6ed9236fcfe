"""The `pica` command: finds the subcommand, runs it, and turns errors into one sentence and an exit status.

Exit status: 0 done; 2 something the user can put right; 130 interrupted; 1 a bug. Nothing here imports torch.
"""

import contextlib
import importlib
import keyword
import os
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType

from _pica_entry import quiet_imports
from pica._version import __version__
from pica._versions import check_extra, check_hosts
from pica.cli.show import say, show
from pica.errors import ConfigError, LaunchError, PicaError
from pica.experiments.interrupts import Interrupted, raised_until_heeded
from pica.files.output import disk_is_full
from pica.foreign_code import FLAG

COMMANDS = {
    "train": "fine-tune a model and measure what it gained; no arguments: a small example that needs no download",
    "chat": "talk to a model, an adapter or what a run learnt; /base and /both hold them beside each other",
    "generate": "answer a file of prompts, or one prompt",
    "data": "what a model would see of a file of conversations or preferences, before any training",
    "compare": "train several methods on one task side by side, and write one report page",
    "evaluate": "measure a model or an adapter on a task",
    "report": "write one page about a run, or a comparison's anew",
    "merge": "write model and adapter as one plain model folder",
    "export": "write a PiCa adapter as a LoRA that serving engines load",
    "push": "put an adapter and its card on the hub, private unless you say otherwise",
    "import": "read an adapter of the authors' reference implementation",
    "basis": "make the directions of a base model once, also from data, for all adapters on it",
    "plan": "what an adapter would cost on a model of any size, from its config alone",
    "analyze": "where fine-tuning moved the weights, and what of the theory holds there",
    "verify": "check an adapter's files, and that it belongs to its base model",
    "cache": "what the cache of solved bases takes; clear empties it",
    "recipes": "the recipes and comparisons inside the package",
    "init": "write a recipe for your model and data, with comments, after three questions",
    "schema": "the JSON schema of recipes or comparisons, for editors",
    "completion": "completion for bash, zsh or fish",
    "env": "versions, devices and caches for a bug report",
}

_NEED_NO_EXTRA = ("cache", "env")
"""Commands that do with what `import pica` needs."""

DEVICES = ("cpu", "cuda", "mps", "xpu")

USAGE = """usage: pica COMMAND ...
       pica help COMMAND

PiCa: parameter-efficient fine-tuning with column space projection.

commands:
{commands}

options:
  --help       show this text
  --version    show the version
  --debug      show the full traceback of an error (so does PICA_DEBUG=1)
  --no-cache   solve every basis, and store none (so does PICA_CACHE_DIR=)
  --device D   cpu, cuda, cuda:N, mps or xpu (so does PICA_DEVICE=D; default:
               the accelerator if there is one)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; `argv` defaults to the process's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("PICA_DEBUG", "") not in ("", "0")
    arguments, settings = _settings(arguments)
    quiet_imports()
    if any("\0" in argument for argument in arguments):
        say("error: An argument holds a NUL character, which is part of no name; remove it.")
        return 2
    request = None
    try:
        with raised_until_heeded() as request, _environment(settings | _visible_devices(settings)):
            status = _dispatch(arguments)
        if sys.stdout is not None:  # it is, where the caller has closed it
            sys.stdout.flush()  # here and not when Python ends, so that what goes wrong is dealt with below
        return status
    except Interrupted as stopped:
        if first_process():
            say(_how_to_go_on(stopped))
        return 130
    except KeyboardInterrupt:
        return _interrupted()
    except PicaError as error:
        if debug:
            traceback.print_exc()
        if first_process() or not isinstance(error, LaunchError):
            say(f"error: {error}")
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        _drop_output()
        return 0
    except Exception as error:
        if disk_is_full(error) and not debug:
            _drop_output()
            say(f"error: No room left on the disk ({error}); free some space or choose another place with --output.")
            return 2
        if _peer_is_gone(error) and not debug:
            say("error: Another process of this job has ended; what it said tells why.")
            return 1
        if _memory_is_short(error) and not debug:
            reason = (str(error).strip().splitlines() or ["no room"])[0]
            say(f"error: Not enough memory ({reason}); choose a smaller batch, rank or length.")
            return 2
        if isinstance(error, OSError) and error.filename is not None and not debug:
            say(
                f"error: {os.fsdecode(error.filename)!r} can't be used: {error.strerror}."
            )  # the system refused a place
            return 2
        if request is not None and request.made and not debug:
            return _interrupted()
        traceback.print_exc()
        say("This is a bug; please report it with the lines above and the output of `pica env`.")
        return 1


def _interrupted() -> int:
    if first_process():
        say("Interrupted; nothing was left unfinished on disk.")
    return 130


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and len(arguments) > 1:
        _, name, *topics = arguments
        arguments = [name, "--help", *topics]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        columns, indent = shutil.get_terminal_size().columns, 5 + max(map(len, COMMANDS))
        lines = (
            textwrap.fill(summary, columns, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
            for name, summary in COMMANDS.items()
        )
        show(USAGE.format(commands="\n".join(lines)), end="")
        return 0
    if arguments[0] == "--version":
        show(f"pica {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        say(f"error: Unknown command {name!r}: {hint}the commands are {', '.join(COMMANDS)}.")
        return 2
    if name not in ("train", "env") and os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:
        if first_process():
            say(f"error: Only pica train runs in several processes; start pica {name} without the launcher.")
        return 2
    if name != "env" and not {"-h", "--help"} & set(rest):
        check_hosts()
    if name not in _NEED_NO_EXTRA:
        check_extra("cli", f"pica {name}")
    try:
        return command_module(name).run(rest)
    except SystemExit as stop:  # argparse has printed its help or its complaint
        return stop.code if isinstance(stop.code, int) else 2


def command_module(name: str) -> ModuleType:
    """The module of a command: `parser()` makes its options, `run(arguments)` runs it."""
    return importlib.import_module(f"pica.cli.{name}_" if keyword.iskeyword(name) else f"pica.cli.{name}")


def _settings(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without the options that every command has, and what those put into the environment."""
    left: list[str] = []
    settings: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--no-cache":
            settings["PICA_CACHE_DIR"] = ""
        elif argument == "--device" or argument.startswith("--device="):
            settings["PICA_DEVICE"] = argument.partition("=")[2] if "=" in argument else rest.pop(0) if rest else ""
        elif argument != "--debug":
            left.append(argument)
    return left, settings


def _visible_devices(settings: Mapping[str, str]) -> dict[str, str]:
    """Hold the name of a device that was asked for, if one was.

    Returns:
        What makes a device with a number the only one that torch will see, as environment variables.
    Raises:
        ConfigError: The name is no device's.
    """
    name = settings.get("PICA_DEVICE", os.environ.get("PICA_DEVICE"))
    if name is None:
        return {}
    kind, colon, number = name.partition(":")
    if kind not in DEVICES or (colon and not (kind == "cuda" and number.isdecimal())):
        raise ConfigError(f"--device {name!r}: there is no such device; it is one of cpu, cuda, cuda:N, mps and xpu.")
    return {"CUDA_VISIBLE_DEVICES": number} if colon else {}


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables meanwhile: they reach processes that the command starts, and need no import."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _how_to_go_on(stopped: Interrupted) -> str:
    if stopped.folder is None:
        return "Interrupted before training began; nothing was written."
    from pica.experiments.results.comparison import COMPARISON

    where = "what was measured so far is kept"
    if stopped.checkpoint:
        loadable = (stopped.checkpoint / "adapter_model.safetensors").is_file()  # not where it is kept in parts
        where = f"the checkpoint {str(stopped.checkpoint)!r} is {'a loadable adapter' if loadable else 'written'}"
    if stopped.checkpoint is None and (stopped.folder / COMPARISON).is_file():
        return (
            f"Interrupted; finished cells are kept in {str(stopped.folder)!r}; the same command goes on with the rest."
        )
    again = f" {FLAG}" if stopped.trusted else ""
    return f"Interrupted; {where}. Continue with: pica train --resume {shlex.quote(str(stopped.folder))}{again}"


def first_process() -> bool:
    """Whether this is the one of several processes that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _drop_output() -> None:
    """Drop what standard output still holds if it cannot be written: it would fail once more when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except AttributeError:  # closed by the caller
        pass


def _memory_is_short(error: Exception) -> bool:
    """Whether more was asked for than the machine or its accelerator has, in the words of either."""
    told = ("not enough memory", "out of memory", "can't allocate memory")
    named = isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and any(text in str(error).lower() for text in told))


def _peer_is_gone(error: Exception) -> bool:
    """Whether torch's communication failed since the process at the other end is no more."""
    return "RANK" in os.environ and (
        any(kind.__name__ == "DistError" for kind in type(error).__mro__) or "by peer" in str(error)
    )
