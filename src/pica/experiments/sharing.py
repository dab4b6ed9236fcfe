"""Giving an adapter to others: its card, and the files that go to the hub."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from pica.adapters.card import CARD, PLACE, card_text, is_generated, is_local, write_card
from pica.errors import AdapterFileError, ConfigError, OutputError
from pica.experiments.evaluate.assessing import find_adapter
from pica.experiments.evaluate.evaluation import shown_score
from pica.experiments.recipes.recipe import Recipe, weights_of
from pica.experiments.results.run import RunMetrics
from pica.files.documents import read_json

CONFIG = "adapter_config.json"
_ADAPTER = (CONFIG, "adapter_model.safetensors", CARD, "chat_template.jinja", "LICENSE*")
_BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_MORE = ("preprocessor_config.json", "processor_config.json", "generation_config.json")


# ---- the card of a run ----------------------------------------------------------------------------------------------


def write_run_card(adapter: Path, recipe: Recipe, metrics: RunMetrics, described: Sequence[str] = ()) -> None:
    """Write the card of the adapter that a run has trained and measured.

    Args:
        adapter: Its folder.
        recipe: Of the run.
        metrics: What the run measured.
        described: Sentences on the training data.
    """
    trained, counts, task = metrics.adapter, metrics.problems, metrics.task
    what = {"chat": "conversations", "preference": "pairs", "dreambooth": "pictures"}.get(task, "examples")
    talks = task in ("chat", "preference")
    subset = f", {recipe.task.subset}" if recipe.task.subset else ""
    names = [name if name.startswith("hub:") else Path(name).name for name in weights_of(recipe.data.train)]
    learnt = [text.removeprefix("Training data: ") for text in described] or [f"{counts.train:,} {what} learnt from"]
    facts = {
        "task": f"{task}{subset}",
        "data": f"{', '.join(f'`{name}`' for name in names)}: {'; '.join(learnt)}; {counts.test:,} held out",
        "training": f"{trained.training.steps:,} steps, learning rate {trained.learning_rate:g}, seed {metrics.seed}",
        "base in training": f"quantised ({recipe.model.quantization})" if recipe.model.quantization else "",
        "classes": ", ".join(map(str, recipe.task.labels or ())),
        "chat template": "in `chat_template.jinja`" if talks else "",
        "system prompt": recipe.task.system or "" if talks else "",
    }
    models = ([("before", metrics.base)] if metrics.base else []) + [("after", trained)]
    measured = [one for _, one in models]
    rows = [
        ["", *(title for title, _ in models)],
        [
            trained.metric.replace("_", " "),
            *(shown_score(trained.metric, one.score, one.stderr, one.examples) for one in measured),
        ],
        ["held-out loss", *(_with_error(one.loss, one.loss_stderr) for one in measured)],
    ]
    if "perplexity" in trained.scores:
        rows.append(["perplexity", *(f"{one.scores['perplexity']:,.2f}" for one in measured)])
    for name in ("chosen_likelier", "reward_margin", "mean_reward"):
        if name in trained.scores:
            found = [shown_score(name, one.scores[name], one.scores[f"{name}_stderr"]) for one in measured]
            rows.append([name.replace("_", " "), *found])
    note = f"On {trained.examples:,} held-out {what}, one seed; ± is the standard error, brackets the 95% interval."
    write_card(adapter, title=f"{metrics.name}: {trained.title}", facts=facts, measures=rows, note=note, tags=[task])


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


# ---- what goes to the hub -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Upload:
    """What is to be pushed.

    Attributes:
        folder: The adapter's.
        files: Content, or where it lies, by its path in the repository.
        size: Bytes.
    """

    folder: Path
    files: Mapping[str, Path | bytes]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in self.files.values())


def plan_upload(place: Path, name: str, *, base: str | None = None, everything: bool = False) -> Upload:
    """Find the files of an adapter, or of a run's adapter, and put its card and configuration in order.

    Nothing on the disk is changed. Hidden files never go along.

    Args:
        place: An adapter folder, or a run's, whose adapter is meant.
        name: OWNER/NAME on the hub; stands in the card's examples.
        base: What the base model is called on the hub, in place of what the adapter records.
        everything: Also what is no part of an adapter; of a run, its files beside those of the adapter.
    Returns:
        The files, and what they are called on the hub.
    Raises:
        AdapterFileError: There is no adapter.
        ConfigError: Something else lies in its folder, or its base model is a folder of this machine.
    """
    folder = find_adapter(place)
    if folder is None:
        state = "holds no adapter_config.json" if place.is_dir() else "does not exist"
        raise AdapterFileError(f"Adapter folder {str(place)!r} {state}.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise AdapterFileError(f"Adapter folder {str(folder)!r} holds no adapter_model.safetensors; save it anew.")
    own = _visible_files(folder)
    others = [path for path in own if not _belongs(folder, path)]
    if others and not everything:
        names = ", ".join(path.relative_to(folder).as_posix() for path in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ConfigError(
            f"{str(folder)!r} holds what is no part of an adapter: {names}{more}. Take it out, or push it too with --all."
        )
    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in own}
    if everything and folder != place:
        beside = [path for path in _visible_files(place) if folder not in path.parents]
        files = {**{path.relative_to(place).as_posix(): path for path in beside}, **files}
    for path in own:
        if path.name == CONFIG:
            where = path.parent.relative_to(folder)
            config, card = _for_everybody(path.parent, name, base)
            files[(where / CONFIG).as_posix()] = config
            files[(where / CARD).as_posix()] = card
    return Upload(folder, files)


def _visible_files(folder: Path) -> list[Path]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _belongs(folder: Path, path: Path) -> bool:
    """Whether a file is one of an adapter: of the folder itself, or of a further part of a pipeline within it."""
    inside = path.parent
    if inside != folder and (inside.parent != folder or inside.name.startswith("checkpoint-")):
        return False
    if not (inside / CONFIG).is_file():
        return False
    return any(fnmatch(path.name, pattern) for pattern in (*_ADAPTER, *_BESIDE, *_MORE))


def _for_everybody(folder: Path, name: str, base: str | None) -> tuple[bytes, bytes]:
    """Configuration and card, without places of this machine."""
    config = read_json(folder / CONFIG)
    recorded = base or config.get("base_model_name_or_path")
    if not isinstance(recorded, str) or is_local(recorded):
        raise ConfigError(
            f"The base model of {str(folder)!r} is {'not recorded' if not recorded else f'the folder {recorded!r}'}, which "
            "nobody else has; say what it is called on the hub with --base OWNER/NAME."
        )
    before = config.get("base_model_name_or_path")
    config["base_model_name_or_path"] = recorded
    card = folder / CARD
    if not is_generated(card):
        return _json(config), card.read_bytes()
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    text = _renamed(text, folder, config, before) if PLACE in text else card_text(folder, config)
    return _json(config), text.replace(PLACE, name).encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _renamed(text: str, folder: Path, config: Mapping[str, Any], before: Any) -> str:
    """A generated card with the base model's new name: what is measured in it stays."""
    old = card_text(folder, {**config, "base_model_name_or_path": before}).splitlines()
    new = card_text(folder, config).splitlines()
    if len(old) != len(new):  # no base model was recorded
        return "\n".join(new)
    changed = {was: now for was, now in zip(old, new) if was != now}
    return "\n".join(changed.get(line, line) for line in text.splitlines()) + "\n"


def push(upload: Upload, name: str, *, public: bool = False) -> tuple[str, bool]:
    """Make the repository where it is not there yet, and put the files into it in one commit.

    Args:
        upload: What.
        name: OWNER/NAME.
        public: Whether anybody may read a new one. Unless it is given, one that is public already is refused.

    Returns:
        Its address, and whether it is private.

    Raises:
        ConfigError: The name is none, there is no token, or the repository is public and was not to be.
        OutputError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    # the base of all errors of whatever HTTP library this version of the client is built on
    from_network = cast(type[Exception], HfHubHTTPError.__bases__[0])
    check_name(name, validate_repo_id, HFValidationError)
    if get_token() is None:
        raise ConfigError("There is no token for the hub: run hf auth login, or set HF_TOKEN, with one that may write.")
    api = HfApi(library_name="pica")
    try:
        try:
            private = bool(api.model_info(name).private)
        except RepositoryNotFoundError:
            api.create_repo(name, private=not public)
            private = not public
        else:
            if not private and not public:
                raise ConfigError(f"{name} is on the hub already, and anybody may read it; say so with --public.")
        operations = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in upload.files.items()
        ]
        api.create_commit(name, operations, commit_message="Upload adapter with pica")
    except OfflineModeIsEnabled:
        raise OutputError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        told = {401: "the token is not valid", 403: f"the token may not write to {name}"}
        reason = told.get(status) or f"{error.server_message or str(error).splitlines()[0]}"
        raise OutputError(f"The hub refuses to take {name}: {reason}.") from None
    except (from_network, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutputError(f"The hub at {api.endpoint} cannot be reached ({reason}); nothing was pushed.") from None
    return f"{api.endpoint}/{name}", private


def check_name(name: str, validate: Any, wrong: type[Exception]) -> None:
    """Raise `ConfigError` unless this is OWNER/NAME as the hub has them; `validate` raises `wrong`."""
    try:
        validate(name)
    except wrong as error:
        raise ConfigError(f"{name!r} is no name on the hub: {str(error).splitlines()[0]}") from None
    if name.count("/") != 1:
        raise ConfigError(f"{name!r} is no name on the hub; give OWNER/NAME.")
