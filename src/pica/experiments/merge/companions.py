"""What lies beside a model's weights and makes its inputs: tokenizer, processors, generation settings."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from pica.errors import AdapterFileError, ConfigError
from pica.experiments.models import locate, read_pretrained
from pica.experiments.recipes.recipe import ModelSection
from pica.text import first_line

_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_SENTENCES = "modules.json"  # of sentence-transformers: names the parts that come after the model, such as its pooling
_SENTENCE_FILES = ("config_sentence_transformers.json", "sentence_bert_config.json")


class Companions:
    """Those of an adapter, else of its base model; read before the weights, so that what is wrong shows early.

    Raises:
        AdapterFileError, ConfigError: One is there and cannot be read.
    """

    def __init__(self, adapter: Path, section: ModelSection) -> None:
        self._adapter, self._section = adapter, section
        found = [self._read(("processor_config.json",), AutoProcessor), self._read(_TOKENIZER, AutoTokenizer)]
        found += [self._read(("preprocessor_config.json",), AutoImageProcessor, AutoFeatureExtractor)]
        self._savable = [one for one in found if one is not None]

    def generation_config(self) -> GenerationConfig | None:
        """The generation settings beside the adapter; those of the base model come with it."""
        if not (self._adapter / "generation_config.json").is_file():
            return None
        try:
            return GenerationConfig.from_pretrained(str(self._adapter))
        except (OSError, ValueError) as error:
            raise AdapterFileError(
                f"{self._adapter / 'generation_config.json'} cannot be read: {first_line(error)}"
            ) from error

    def save(self, folder: Path) -> None:
        """Write them all into a model folder."""
        for one in self._savable:
            one.save_pretrained(str(folder))
        for beside in (self._adapter, None):
            if modules := self._find(_SENTENCES, beside):
                self._copy_sentence_parts(modules, beside, folder)
                break

    def _read(self, names: Sequence[str], *loaders: Any) -> Any:
        for beside in (self._adapter, None):
            if not any(self._find(name, beside) for name in names):
                continue
            for loader in loaders:
                options = {"backend": "pil"} if loader is AutoImageProcessor else {}
                try:
                    return read_pretrained(loader, self._section, options, beside=beside)
                except ConfigError:
                    if loader is loaders[-1]:
                        raise
        return None

    def _find(self, name: str, beside: Path | None) -> Path | None:
        """A file beside the adapter, or of the base model in its folder or on the hub; None if there is none."""
        location = str(beside or locate(self._section.path))
        place = Path(location)
        if place.is_dir():
            return place / name if (place / name).is_file() else None
        try:
            found = cached_file(
                location, name, revision=self._section.revision or "main", _raise_exceptions_for_missing_entries=False
            )
        except OSError:  # loading the model will tell what is wrong
            return None
        return Path(found) if found else None

    def _copy_sentence_parts(self, modules: Path, beside: Path | None, folder: Path) -> None:
        """Copy the list of a sentence-transformers model's parts, and all parts but the model itself."""
        try:
            parts = [str(part["path"]) for part in json.loads(modules.read_text(encoding="utf-8"))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{str(modules)!r} cannot be read: {first_line(error)}") from error
        if parts[:1] != [""]:  # the model lies in a folder of its own, so what was merged is a part only
            return
        source = modules.parent
        if beside is None and not Path(locate(self._section.path)).is_dir():
            from huggingface_hub import snapshot_download

            wanted = [f"{part}/*" for part in parts if part]
            source = Path(snapshot_download(self._section.path, revision=self._section.revision, allow_patterns=wanted))
        for name in (_SENTENCES, *_SENTENCE_FILES):
            if found := self._find(name, beside):
                shutil.copyfile(found, folder / name)
        for part in filter(None, parts):
            inside = (source / part).resolve()
            if source.resolve() in inside.parents and inside.is_dir():
                shutil.copytree(inside, folder / part, copy_function=shutil.copyfile)
