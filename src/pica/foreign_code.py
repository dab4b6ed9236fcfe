"""Python code that comes with other people's models, tokenizers, pipelines and data sets: not run unless asked for by name.

Every call of a host library that may find such code takes its keyword arguments from `code_options`. This module imports
nothing heavy, so that every floor of the package may use it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

FLAG = "--trust-remote-code"


def code_options(trusted: bool = False) -> dict[str, bool]:
    """Say whether such code may run; left out, transformers asks on the terminal, and takes a piped "y" for an answer.

    Args:
        trusted: Whether the user asked, for this call, that the code be run. A file that came with an adapter can't ask.
    Returns:
        Keyword arguments for `from_pretrained`, `from_config`, `load_dataset` and their kind.
    """
    return {"trust_remote_code": trusted}


def wants_code(error: BaseException) -> bool:
    """Whether a host library refused to load something because it would have to run the code that comes with it."""
    return FLAG.removeprefix("--").replace("-", "_") in str(error) or FLAG in str(error)


def code_refusal(name: str) -> str:
    """Put into words that there is such code, and how to ask for it.

    Args:
        name: Folder or hub name, as the user wrote it.
    Returns:
        One sentence.
    """
    return (
        f"{name!r} comes with Python code of its own, which is not run unless you ask for it: if you trust its authors, "
        f"give {FLAG}."
    )


@contextmanager
def nothing_asked() -> Iterator[None]:
    """Let transformers refuse instead of asking, also where a library between passes no keyword argument on.

    PEFT, for one, loads a tokenizer that a prompt-tuning adapter's file names.
    """
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before
