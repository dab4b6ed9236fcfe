"""PiCa: parameter-efficient fine-tuning with column space projection, as a method of Hugging Face PEFT.

Importing this package registers the method, so that everything in PEFT that takes a `PeftConfig` takes a `PicaConfig`;
likewise its closest rival, SVFT, by `SvftConfig`.
The command line does not need that before it knows what it was asked for: as `pica` it enters through `_pica_entry`. Then
the same names load on first use.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from pica._version import __version__

if TYPE_CHECKING:
    from pica.adapters.averaging import average_adapters
    from pica.adapters.export.lora import export_lora
    from pica.adapters.hotswap import hotswap_adapter
    from pica.adapters.pipelines import load_into_pipeline
    from pica.adapters.reference import import_reference
    from pica.adapters.saving import save_adapter, save_whole
    from pica.adapters.verify import verify
    from pica.basis.cache import use_basis_cache
    from pica.calibration.making import make_basis
    from pica.tuners.base.coverage import coverage
    from pica.tuners.pica.config import PicaConfig
    from pica.tuners.pica.model import PicaModel
    from pica.tuners.svft.config import SvftConfig
    from pica.tuners.svft.model import SvftModel

__all__ = [
    "PicaConfig",
    "PicaModel",
    "SvftConfig",
    "SvftModel",
    "__version__",
    "average_adapters",
    "coverage",
    "export_lora",
    "hotswap_adapter",
    "import_reference",
    "load_into_pipeline",
    "make_basis",
    "register",
    "save_adapter",
    "save_whole",
    "use_basis_cache",
    "verify",
]

_HOMES = {
    "PicaConfig": "pica.tuners.pica.config",
    "PicaModel": "pica.tuners.pica.model",
    "SvftConfig": "pica.tuners.svft.config",
    "SvftModel": "pica.tuners.svft.model",
    "average_adapters": "pica.adapters.averaging",
    "coverage": "pica.tuners.base.coverage",
    "export_lora": "pica.adapters.export.lora",
    "hotswap_adapter": "pica.adapters.hotswap",
    "import_reference": "pica.adapters.reference",
    "load_into_pipeline": "pica.adapters.pipelines",
    "make_basis": "pica.calibration.making",
    "save_adapter": "pica.adapters.saving",
    "save_whole": "pica.adapters.saving",
    "use_basis_cache": "pica.basis.cache",
    "verify": "pica.adapters.verify",
}


def register() -> None:
    """Make PiCa and SVFT methods of PEFT. Importing `pica` does this; calling it again changes nothing.

    Raises:
        VersionError: PyTorch, PEFT or transformers is installed in a version outside of the declared range.
    """
    from pica._versions import check_hosts

    check_hosts()
    from pica.tuners.base.registration import hide_banks_from_base_state, register_method
    from pica.tuners.pica.config import PicaConfig
    from pica.tuners.pica.model import PicaModel
    from pica.tuners.svft.config import SvftConfig
    from pica.tuners.svft.model import SvftModel

    register_method("PICA", PicaConfig, PicaModel)
    register_method("SVFT", SvftConfig, SvftModel)
    hide_banks_from_base_state()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pica' has no attribute {name!r}")
    register()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _command_starts() -> bool:
    """Whether this import is the beginning of `pica` or of `python -m pica`."""
    if getattr(sys.modules.get("_pica_entry"), "starting", False):
        return True
    # Python calls itself "-m" until it has found the module to run, packages around it included.
    words = sys.orig_argv
    return sys.argv[:1] == ["-m"] and "-m" in words and words[words.index("-m") + 1 :][:1] == ["pica"]


# The command line must answer `pica --help` without paying seconds for torch.
if not _command_starts():
    register()
