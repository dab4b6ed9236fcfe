"""What one talks to: a model, an adapter, or what a run learnt, with the chat template that it was trained in."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pica.errors import ConfigError
from pica.experiments.chat.rendering import Renderer
from pica.experiments.chat.talking import Speaker
from pica.experiments.chat.templates import asked_alone, set_template
from pica.experiments.evaluate.assessing import find_adapter, run_of
from pica.experiments.models import base_of, device, load_adapter, load_model, load_tokenizer
from pica.experiments.recipes.recipe import ModelSection, Recipe
from pica.tasks import TEMPLATES, Template, get_task
from pica.tasks.reward import scored_task

BASE = "base"
"""What the model without an adapter is called."""


@dataclass
class Talker:
    """A model with the adapters that it can speak with.

    Attributes:
        speaker: Asks whatever is active.
        adapters: Their names, in the order in which they were given.
        model: What the model is called.
        system: The system prompt that the first adapter was trained with.
        note: What is to be known of how they are asked, in a line; None for the usual.
    """

    speaker: Speaker
    adapters: list[str]
    model: str
    system: str | None
    note: str | None = None

    def check(self, name: str) -> None:
        """Raise `ConfigError` where there is no adapter of that name."""
        if name not in (BASE, *self.adapters):
            known = ", ".join([*self.adapters, BASE])
            raise ConfigError(f"There is no adapter {name!r} here; there are {known}.")

    def use(self, name: str) -> Any:
        """Let the adapter of that name speak, or the model alone (`BASE`).

        Returns:
            The context in which it does.
        Raises:
            ConfigError: There is no such adapter.
        """
        self.check(name)
        if name == BASE:
            return self.speaker.model.disable_adapter() if self.adapters else nullcontext()
        self.speaker.model.set_adapter(name)
        return nullcontext()


def load_talker(
    places: list[str],
    *,
    base: str | None = None,
    template: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Talker:
    """Load a model, or the base model of one or more adapters with them.

    Args:
        places: A model, or adapter folders and runs' folders that have one base model.
        base: The base model, if not the one that the adapters record.
        template: As `task.chat_template`.
        dtype: Precision of the model; that of the run if unset.
        revision: Of a model on the hub.
        trust_remote_code: Whether code that comes with the model may run.
    Returns:
        The model, its adapters and their names.
    Raises:
        ConfigError: The adapters do not fit together, or a place holds none.
        PicaError: Something of it is not to be had.
    """
    adapters = [find_adapter(Path(place).expanduser()) for place in places]
    if len(places) > 1 and None in adapters:
        raise ConfigError(
            f"{places[adapters.index(None)]!r} holds no adapter; name one model, or adapters of one model."
        )
    found = [adapter for adapter in adapters if adapter is not None]
    run = run_of(found[0]) if found else None
    where = base_of(found[0], base) if found else places[0]
    for other in found[1:]:
        if (theirs := base_of(other, base)) != where:
            raise ConfigError(f"Adapter {str(other)!r} belongs to {theirs!r} and {str(found[0])!r} to {where!r}.")
    section = ModelSection(path=where, revision=revision, trust_remote_code=trust_remote_code)
    section.dtype = dtype or (run.model.dtype if run else "auto")  # pyright: ignore[reportAttributeAccessIssue]
    if run is not None:
        section.quantization = run.model.quantization
    tokenizer = load_tokenizer(section, beside=found[0] if found else None)
    own = None if run is None else prompts_of(run)
    otherwise = None if own is None else asked_alone(own, tokenizer)
    named = template or (run.task.chat_template if run else None)
    used = set_template(tokenizer, named, found[0] if found else None, otherwise)
    model: Any = load_model(section)
    names = []
    for adapter in found:
        name = _name_of(adapter, names)
        if not names:
            model = load_adapter(model, adapter, name=name)
        else:
            model.load_adapter(str(adapter), adapter_name=name)
        names.append(name)
    speaker = Speaker(model.to(device()), tokenizer, Renderer(tokenizer))
    note = None
    if own is not None and used == otherwise:
        asked = own.text.format(question="...").replace("\n", "\\n")
        note = f'No chat template: each question is asked by itself, as in training, "{asked}".'
    return Talker(speaker, names, where, run.task.system if run else None, note)


def prompts_of(run: Recipe) -> Template | None:
    """The template of the prompts that a run was trained on; None for a run on conversations."""
    task: Any = get_task(run.task.name)
    if task.kind == "reward":
        task = scored_task(run.task.subset)
    return TEMPLATES[run.task.template or task.default_template] if task.kind == "generation" else None


def _name_of(adapter: Path, taken: list[str]) -> str:
    """A short name: the folder's, or its run's; without dots, which PEFT does not take, and unlike those before."""
    folder = adapter.resolve()
    plain = (folder.parent if folder.name == "adapter" else folder).name.replace(".", "-") or "adapter"
    plain = f"{plain}-adapter" if plain == BASE else plain
    names = [plain, *(f"{plain}-{number}" for number in range(2, 1000))]
    return next(name for name in names if name not in taken)
