"""What a plug-in for a serving engine needs: an adapter's name in, the folder of its export out."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pica._version import __version__
from pica.adapters.integrations.export_cache import ExportCache
from pica.adapters.integrations.exporting import Exporter, Job, RefusedError
from pica.adapters.integrations.named import AdapterFolder, NamedAdapter
from pica.basis.cache import cache_home
from pica.errors import AdapterFileError, ConfigError, OutputError

logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 20 * 2**30
_CHANGES_WHILE_EXPORTED = 3
_REMEMBERED = 1000  # refusals


@dataclass(frozen=True)
class ServingOptions:
    """What the operator sets, in environment variables that begin with PICA_VLLM_.

    Attributes:
        adapters: ADAPTERS, the folder of adapters.
        cache: CACHE, the folder of exports; by default `vllm` in pica's cache folder.
        limit: CACHE_LIMIT, bytes that exports may take.
        rank, energy: RANK and ENERGY, as in `export_lora`; the export is exact without them.
        native: NATIVE=1, one basis and one matrix a role for the engine's layers.
    """

    adapters: Path
    cache: Path
    limit: int = DEFAULT_LIMIT
    rank: int | None = None
    energy: float | None = None
    native: bool = False

    @classmethod
    def read(cls, environment: Mapping[str, str], prefix: str = "PICA_VLLM_") -> ServingOptions:
        """Read the options.

        Args:
            environment: Variables and their values.
            prefix: What their names begin with.
        Returns:
            The options.
        Raises:
            ConfigError: one of them has a value that it cannot have.
        """

        def number(name: str, kind: type[int] | type[float], least: float, most: float = float("inf")) -> float | None:
            text = environment.get(prefix + name, "")
            if not text:
                return None
            try:
                value = kind(text)
            except ValueError:
                value = least - 1
            if not least <= value <= most:
                what = "a whole number" if kind is int else "a number"
                above = "" if most == float("inf") else f" and at most {most:g}"
                raise ConfigError(f"{prefix}{name}={text!r} must be {what} of at least {least:g}{above}.")
            return value

        rank, energy = number("RANK", int, 1), number("ENERGY", float, 1e-6, 1.0)
        if rank is not None and energy is not None:
            raise ConfigError(f"{prefix}RANK and {prefix}ENERGY both choose the size of an export; set one of them.")
        native = environment.get(prefix + "NATIVE", "") not in ("", "0")
        if native and (rank is not None or energy is not None):
            raise ConfigError(f"{prefix}NATIVE shares exact matrices; set it, or {prefix}RANK or {prefix}ENERGY.")
        limit = number("CACHE_LIMIT", int, 0)
        cache = environment.get(prefix + "CACHE") or cache_home(environment) / "vllm"
        return cls(
            adapters=Path(environment[prefix + "ADAPTERS"]),
            cache=Path(os.path.abspath(os.path.expanduser(cache))),
            limit=DEFAULT_LIMIT if limit is None else int(limit),
            rank=None if rank is None else int(rank),
            energy=energy,
            native=native,
        )


class AdapterServer:
    """Exports adapters of one folder when they are asked for, each once, for whichever base model the engine has."""

    def __init__(self, options: ServingOptions, engine: str) -> None:
        """Take the folders.

        Args:
            options: What the operator set.
            engine: As in `export_lora`.
        Raises:
            ConfigError: the folder of adapters does not exist.
        """
        self._options, self._engine = options, engine
        self._adapters = AdapterFolder(options.adapters)
        self._cache = ExportCache(options.cache, options.limit)
        self.exporter = Exporter()
        self._refused: dict[NamedAdapter, str] = {}

    def find(self, name: str) -> NamedAdapter | None:
        """The adapter of that name as it is now; see `AdapterFolder.find`."""
        return self._adapters.find(name)

    async def export(self, base: str, name: str) -> tuple[NamedAdapter, Path] | None:
        """Find an adapter and its export, which is made now if it is not there.

        Args:
            base: Folder or hub name of the base model.
            name: The adapter's, as a client sent it.
        Returns:
            The adapter and the folder of its export; None for a name that is not known.
        Raises:
            RefusedError: the adapter is damaged, of another base model, or nothing that this engine can serve.
            OutputError: the export could not be written.
        """
        try:
            for _ in range(_CHANGES_WHILE_EXPORTED):
                adapter = await asyncio.to_thread(self._adapters.find, name)
                if adapter is None:
                    return None
                if adapter in self._refused:
                    raise RefusedError(self._refused[adapter])
                key = await asyncio.to_thread(self._key, base, adapter)
                if await asyncio.to_thread(self._cache.take, key):
                    return adapter, self._cache.entry(key)
                await self._make(base, adapter, key)
                # what was exported is what was looked at, unless the files were written meanwhile
                if self._adapters.find(name) == adapter and await asyncio.to_thread(self._cache.take, key):
                    await asyncio.to_thread(self._cache.trim)
                    return adapter, self._cache.entry(key)
        except AdapterFileError as error:
            logger.error("%s", error)
            raise RefusedError(str(error)) from error
        raise OutputError(f"Adapter {name!r} is being written; ask for it again when that is done.")

    async def _make(self, base: str, adapter: NamedAdapter, key: str) -> None:
        options = self._options
        output = self._cache.entry(key)
        job = Job(str(adapter.folder), str(output), base, self._engine, options.rank, options.energy, options.native)
        try:
            await self.exporter.run(job)
        except RefusedError as error:
            # clients get the reason, not the server's paths
            text = str(error).replace(str(adapter.folder), adapter.name).replace(str(output), adapter.name)
            message = f"Adapter {adapter.name!r} is not served: {text}"
            logger.error("%s", message)
            if len(self._refused) >= _REMEMBERED:
                self._refused.clear()
            self._refused[adapter] = message
            raise RefusedError(message) from error
        except OutputError as error:
            logger.error("Adapter %r could not be exported: %s", adapter.name, error)
            raise

    def _key(self, base: str, adapter: NamedAdapter) -> str:
        """Names an export by all that decides its content."""
        options = self._options
        parts = (adapter.digest(), base, base_state(base), self._engine, options.rank, options.energy, options.native)
        parts = (*parts, __version__)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def base_state(base: str) -> str:
    """Changes when the files of a base model do: their sizes and times, or the snapshot of the hub's cache."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
        return repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base, "config.json")
    return found if isinstance(found, str) else ""
