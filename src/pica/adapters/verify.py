"""Does an adapter folder hold what it should, and does it belong to this base model?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pica.adapters.base_model import flags_kept, load_base_model, read_peft_config, share_tensors
from pica.adapters.export.check import example_inputs, output_of
from pica.adapters.fitting import fit_embeddings
from pica.basis.fingerprint import decode
from pica.errors import AdapterFileError, BasisMismatchError, PicaError
from pica.text import first_line
from pica.tuners.base.bank import BANK_NAMES, find_banks
from pica.tuners.base.config import BankedConfig
from pica.tuners.base.verification import TOLERANCE, check_fingerprint

_BANKS = tuple(f"{name}." for name in BANK_NAMES)
_FINGERPRINTS = tuple(f"{bank}fingerprint" for bank in _BANKS)


def _is_matrix(key: str) -> bool:
    """Whether an entry of a file is trained; beside those it holds bases, positions and the fingerprint."""
    beside = (".basis:", ".positions:")
    return any(b in key for b in _BANKS) and not any(b in key for b in beside) and not key.endswith(_FINGERPRINTS)


@dataclass(frozen=True)
class Check:
    """One question about an adapter. `passed` is None where it could not be asked; `detail` says what was found."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """Answers about one adapter folder; `str()` prints them as a table."""

    adapter: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check that was made passed."""
        return all(check.passed is not False for check in self.checks)

    def rows(self) -> dict[str, str]:
        """What came of each check, by its name."""
        marks = {True: "ok     ", False: "FAILED ", None: "skipped"}
        return {check.name: f"{marks[check.passed]}  {check.detail}" for check in self.checks}

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        return "\n".join(f"{name.ljust(width)}  {text}" for name, text in self.rows().items())


def verify(
    adapter_dir: str | Path, base_model: nn.Module | str | None = None, *, trust_remote_code: bool = False
) -> VerifyReport:
    """Check a saved PiCa or SVFT adapter, and with a base model whether it belongs to that.

    Args:
        adapter_dir: Folder with adapter_config.json and adapter_model.safetensors.
        base_model: A model (left as it is) or the folder or name of one. None asks only what the files alone answer.
        trust_remote_code: Run the Python code that comes with a base model that is given by name, if it has some.
    Returns:
        A report; a failed check is an entry in it, not an exception.
    Raises:
        ConfigError: the base model cannot be loaded.
    """
    folder = Path(adapter_dir).expanduser()
    checks: list[Check] = []
    try:
        config = read_peft_config(folder)
        tensors = _read_tensors(folder / "adapter_model.safetensors")
    except PicaError as error:
        return VerifyReport(str(folder), (Check("readable", False, str(error)),))
    size = (folder / "adapter_model.safetensors").stat().st_size
    shape = config.size_text()
    checks.append(Check("readable", True, f"{len(tensors)} tensors, {size:,} bytes, {shape}"))
    checks += [_finite(tensors), _complete(tensors)]
    if base_model is None:
        checks += [
            Check(n, None, "needs the base model") for n in ("right shapes", "belongs to this base", "has an effect")
        ]
        return VerifyReport(str(folder), tuple(checks))
    with flags_kept(base_model):
        if isinstance(base_model, nn.Module):
            model = share_tensors(base_model)
        else:
            model = load_base_model(base_model, config, folder=folder, trust_remote_code=trust_remote_code)
        return VerifyReport(str(folder), (*checks, *_against(model, folder, config, tensors)))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:  # memory-mapped: a file that lies about its size is refused here
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{str(path)!r} is damaged or cut short ({first_line(error)}).") from error


def _finite(tensors: dict[str, Tensor]) -> Check:
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    return Check("finite", not bad, f"NaN or infinity in {bad[0]}" if bad else "no NaN, no infinity")


def _complete(tensors: dict[str, Tensor]) -> Check:
    matrices = [k for k in tensors if _is_matrix(k)]
    fingerprints = [k for k in tensors if k.endswith(_FINGERPRINTS)]
    if not matrices or len(fingerprints) != 1:
        return Check("complete", False, f"{len(matrices)} shared matrices, {len(fingerprints)} basis fingerprints")
    try:
        prints, mode, probes = decode(tensors[fingerprints[0]].numpy().tobytes())
    except (AdapterFileError, TypeError, RuntimeError) as error:
        return Check("complete", False, str(error))
    return Check(
        "complete",
        True,
        f"{len(matrices)} shared matrices, fingerprints of {len(prints)} layers ({mode}, {probes} probes)",
    )


def _against(base: nn.Module, folder: Path, config: BankedConfig, tensors: dict[str, Tensor]) -> list[Check]:
    """The questions that need the base model, which is used up: what loading does, and what it changes."""
    try:
        fit_embeddings(base, folder, config)
        before = _probe(base)
        loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    except BasisMismatchError as error:
        return [
            Check("right shapes", True, "the adapter's matrices fit this model"),
            Check("belongs to this base", False, str(error)),
        ]
    except (PicaError, ValueError, RuntimeError, KeyError, TypeError) as error:
        return [Check("right shapes", False, str(error) if isinstance(error, PicaError) else first_line(error))]
    _, bank = find_banks(loaded.get_base_model())[0]
    slot = bank.matrices("default")
    shapes = Check("right shapes", True, f"{len(slot)} groups on {len(slot.layers)} layers")
    fingerprint = next(v for k, v in tensors.items() if k.endswith(_FINGERPRINTS))  # else it would not have loaded
    worst = max(check_fingerprint(slot, "default", fingerprint), key=lambda c: c.alignment.deviation)
    detail = f"largest deviation {worst.alignment.deviation:.2%} (accepted up to {TOLERANCE:.0%})"
    return [shapes, Check("belongs to this base", True, detail), _effect(before, _probe(loaded), tensors)]


def _probe(model: nn.Module) -> Tensor | None:
    """Output for a few tokens or pixels, or None for a model of which it is not known what it takes."""
    model.eval()
    try:
        with torch.no_grad():
            return output_of(model, example_inputs(model, next(model.parameters()).device)).float()
    except Exception:  # whatever a model's own code raises on inputs that are not its own
        return None


def _effect(before: Tensor | None, after: Tensor | None, tensors: dict[str, Tensor]) -> Check:
    if before is None or after is None:
        largest = max(float(v.abs().max()) for k, v in tensors.items() if _is_matrix(k) and v.is_floating_point())
        return Check("has an effect", largest > 0, f"largest entry of its matrices {largest:.3g}")
    change = float((after - before).norm() / before.norm().clamp_min(1e-30))
    if not torch.isfinite(after).all():
        return Check("has an effect", False, "the model's output is not finite with it")
    return Check("has an effect", change > 0, f"changes the output by {change:.2%}" if change else "changes nothing")
