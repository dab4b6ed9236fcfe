"""vLLM's plug-in: PiCa and SVFT adapters by their names, exported when they are first asked for.

The entry point `pica` of `vllm.general_plugins` registers a `LoRAResolver`, vLLM's documented interface for adapters that it
does not know. vLLM asks a resolver once for a name and keeps the answer, so a changed adapter would never be seen; where the
object that keeps it is found, adapters that have changed are taken out of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pica.adapters.integrations.named import NamedAdapter
from pica.adapters.integrations.serving import AdapterServer, ServingOptions
from pica.errors import AdapterFileError

logger = logging.getLogger("vllm.pica")  # vLLM configures the logger "vllm"

SECONDS_BETWEEN_LOOKS = 2.0
RESOLVER = "PiCa"


class PicaResolver:
    """The resolver, apart from vLLM's base class, so that it can be tried without vLLM.

    Args:
        server: Finds and exports.
        make_request: vLLM's `LoRARequest`, or what stands for it.
    """

    def __init__(self, server: AdapterServer, make_request: Callable[..., Any]) -> None:
        self._server, self._make_request = server, make_request
        self._served: dict[str, NamedAdapter] = {}
        self._models: weakref.WeakSet[Any] = weakref.WeakSet()
        self._watching: asyncio.Task[None] | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Answer vLLM's question for a name.

        Args:
            base_model_name: The served model, as vLLM was given it.
            lora_name: As a client sent it.
        Returns:
            A request for the adapter's export; None for a name that is not known.
        Raises:
            RefusedError: the adapter is damaged, or of another base model; vLLM answers the client with status 400.
            OutputError: the export could not be written; vLLM answers with status 500.
        """
        found = await self._server.export(base_model_name, lora_name)
        if found is None:
            return None
        adapter, folder = found
        self._served[lora_name] = adapter
        if self._models and (self._watching is None or self._watching.done()):
            self._watching = asyncio.create_task(self._watch())
        # vLLM gives it an id of its own; older versions take this one. Its prefix cache goes by name and path, and the
        # path is named by the content.
        number = int(folder.name[:7], 16) + 1
        return self._make_request(lora_name=lora_name, lora_int_id=number, lora_path=str(folder))

    def watch_for(self, models: Any) -> None:
        """Take changed adapters out of `models.lora_requests`, so that vLLM asks for them again."""
        self._models.add(models)

    async def _watch(self) -> None:
        while self._served:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            for name, served in list(self._served.items()):
                try:
                    now = await asyncio.to_thread(self._server.find, name)
                except AdapterFileError:
                    now = None  # asked for again, it is refused
                if now != served:
                    logger.info("Adapter %r has changed; the next request loads it anew.", name)
                    self._served.pop(name, None)
                    for models in list(self._models):
                        models.lora_requests.pop(name, None)


def register() -> None:
    """The entry point: register the resolver, where `PICA_VLLM_ADAPTERS` names a folder.

    Raises:
        ConfigError: the folder does not exist, or another variable has a wrong value.
    """
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

    options = ServingOptions.read(os.environ)
    if options.native:
        options = _with_native_layers(options)
    resolver_class: Any = type("PicaLoRAResolver", (PicaResolver, LoRAResolver), {})
    resolver = resolver_class(AdapterServer(options, "vllm"), LoRARequest)
    if RESOLVER not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(RESOLVER, resolver)
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() not in ("1", "true"):
        logger.warning(
            "PICA_VLLM_ADAPTERS is set, but vLLM asks no resolver unless VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 is set too."
        )
    _follow_changes(resolver)


def _with_native_layers(options: ServingOptions) -> ServingOptions:
    """The options, with vLLM's layers changed where this vLLM is one that it was tried with; else without."""
    from pica.adapters.integrations import vllm_native

    if why := vllm_native.obstacle():
        logger.warning("PICA_VLLM_NATIVE is left out, and adapters are served as plain LoRA: %s.", why)
        return replace(options, native=False)
    vllm_native.install()
    logger.info("PiCa adapters share one basis and one matrix for all layers of a role.")
    return options


def _follow_changes(resolver: PicaResolver) -> None:
    """Have the object that keeps vLLM's answers introduce itself to the resolver."""
    try:
        from vllm.entrypoints.openai.models.serving import (  # pyright: ignore[reportMissingImports]
            OpenAIServingModels as Models,
        )
    except ImportError:
        logger.warning(
            "This vLLM keeps adapters elsewhere: after a change, POST /v1/unload_lora_adapter with its name."
        )
        return
    begin = Models.__init__

    def introduced(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        if isinstance(getattr(self, "lora_requests", None), dict):
            resolver.watch_for(self)

    Models.__init__ = introduced
