"""Which chat template a model speaks in: its own, or one that is named; and the copy of it that goes with an adapter."""

import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pica.errors import ConfigError
from pica.tasks import Template

logger = logging.getLogger(__name__)

FILE = "chat_template.jinja"
"""The file beside a model or an adapter that holds its template, as transformers names it."""


def named_templates() -> dict[str, str]:
    """The templates inside the package, by name, for models that have none."""
    folder = resources.files("pica") / "assets" / "chat_templates"
    return {
        entry.name.removesuffix(".jinja"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".jinja")
    }


def template_text(named: str) -> str:
    """Read what `task.chat_template` names: a template of the package, a file, or the template itself.

    Returns:
        The template.
    Raises:
        ConfigError: It is none of these.
    """
    known = named_templates()
    if named in known:
        return known[named]
    if "{%" in named or "{{" in named:
        return named
    path = Path(named).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        raise ConfigError(
            f"task.chat_template = {named!r}: no such file; give one, the template itself, or one of {', '.join(known)}."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"task.chat_template = {named!r}: not UTF-8 text ({error.reason}).") from None


def asked_alone(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template that asks the last question as a task with prompts asks it, without what was said before.

    Args:
        template: The task's.
        tokenizer: Of the model, which may put a start token before every text.

    Returns:
        The template. It refuses a system prompt, which no prompt of such a task had.
    """
    encoded: Any = tokenizer("1")["input_ids"]
    starts = tokenizer.bos_token_id is not None and encoded[0] == tokenizer.bos_token_id
    before, _, after = template.text.partition("{question}")
    begin = json.dumps(f"{tokenizer.bos_token if starts else ''}{before}")
    return (
        "{% for message in messages if message['role'] == 'system' %}"
        "{{ raise_exception('it was trained on questions alone, without a system prompt') }}{% endfor %}"
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list | last %}"
        f"{{{{ {begin} + asked['content'] | trim }}}}"
        "{% set answered = messages[-1]['role'] == 'assistant' %}"
        f"{{% if answered or add_generation_prompt %}}{{{{ {json.dumps(after)} }}}}{{% endif %}}"
        "{% if answered %}"
        f"{{{{ {json.dumps(template.lead)} + messages[-1]['content'] | trim + eos_token }}}}{{% endif %}}"
    )


def set_template(
    tokenizer: PreTrainedTokenizerBase, named: str | None, folder: Path | None = None, otherwise: str | None = None
) -> str:
    """Give the tokenizer the chat template to use.

    Args:
        tokenizer: Changed in place.
        named: What the recipe names; if unset, what an adapter's folder holds, else the tokenizer's own.
        folder: An adapter's folder.
        otherwise: The template to use where there is none.
    Returns:
        The template.
    Raises:
        ConfigError: There is none, or `named` is no template.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several under names; transformers takes this one unless told otherwise
        own = own.get("default")
    stored = None if folder is None else folder / FILE
    if named is not None:
        text = template_text(named)
        if own is not None and own != text:
            logger.warning("The model has a chat template of its own; task.chat_template goes before it.")
    elif stored is not None and stored.is_file():
        text = stored.read_text(encoding="utf-8")
    elif isinstance(own, str) and own.strip():
        text = own
    elif otherwise is not None:
        text = otherwise
    else:
        raise ConfigError(
            "The model's tokenizer has no chat template, so nobody knows how it is spoken to. Name one with "
            "task.chat_template of a recipe (--task.chat_template; pica data and chat have --chat-template): "
            f"{', '.join(named_templates())}, a file, or the template itself."
        )
    tokenizer.chat_template = text
    return text
