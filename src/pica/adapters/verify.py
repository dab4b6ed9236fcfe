"""Does an adapter folder hold what it should, and does it belong to this base model?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pica.adapters.base_model import flags_kept, load_base_model, read_peft_config, share_tensors
from pica.adapters.wording import first_line
from pica.basis.fingerprint import decode
from pica.errors import AdapterFileError, PicaError
from pica.tuner.bank import BANK_NAMES, find_banks
from pica.tuner.base_config import BankedConfig
from pica.tuner.config import PicaConfig
from pica.tuner.meaning import TOLERANCE, check_fingerprint

_BANKS = tuple(f"{name}." for name in BANK_NAMES)
_FINGERPRINTS = tuple(f"{bank}fingerprint" for bank in _BANKS)
_PROBE_TOKENS = 8


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

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        marks = {True: "ok     ", False: "FAILED ", None: "skipped"}
        return "\n".join(f"{c.name.ljust(width)}  {marks[c.passed]}  {c.detail}" for c in self.checks)


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
        if isinstance(base_model, str):
            model = load_base_model(base_model, config, trust_remote_code=trust_remote_code)
        else:
            model = share_tensors(base_model)
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
    """The questions that need the base model, which is used up."""
    plain = copy.copy(config)
    plain.basis_format = None  # solve this base's own bases, to compare
    if isinstance(plain, PicaConfig):
        plain.save_basis = False
    before = _probe(base)
    try:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[plain.peft_type](base, plain, "verified")  # pyright: ignore[reportArgumentType]
    except (PicaError, ValueError) as error:
        return [Check("right shapes", False, first_line(error))]
    _, bank = find_banks(tuner)[0]
    slot = bank.matrices("verified")
    wrong = []
    for group, matrix in slot.items():
        stored = [v for k, v in tensors.items() if k.endswith(tuple(bank + group for bank in _BANKS))]
        if len(stored) != 1 or stored[0].shape != matrix.shape:
            found = tuple(stored[0].shape) if stored else "nothing"
            wrong.append(f"{group} should be {tuple(matrix.shape)}, the file has {found}")
    shapes = Check("right shapes", not wrong, wrong[0] if wrong else f"{len(slot)} groups on {len(slot.layers)} layers")
    if wrong:
        return [shapes]
    fingerprint = next((v for k, v in tensors.items() if k.endswith(_FINGERPRINTS)), None)
    if fingerprint is None:
        return [shapes, Check("belongs to this base", False, "the file holds no basis fingerprint")]
    try:
        layers = check_fingerprint(slot, "verified", fingerprint)
    except PicaError as error:
        return [shapes, Check("belongs to this base", False, str(error))]
    bad = [c for c in layers if not c.acceptable]
    worst = max(layers, key=lambda c: c.alignment.deviation)
    if bad:
        first = bad[0].alignment
        why = first.reason or f"deviation {first.deviation:.0%}"
        detail = f"{len(bad)} of {len(layers)} layers have another basis, e.g. {bad[0].path} ({why})"
        if bad[0].difference and bad[0].trained_origin != bad[0].origin:
            detail += (
                f"; {bad[0].difference}. Give it a base model that is quantised as then (pica.verify takes a model)"
            )
    else:
        detail = f"largest deviation {worst.alignment.deviation:.2%} (accepted up to {TOLERANCE:.0%})"
    belongs = Check("belongs to this base", not bad, detail)
    tuner.unload()
    if bad:
        return [shapes, belongs]
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    return [shapes, belongs, _effect(before, _probe(loaded), tensors)]


def _probe(model: nn.Module) -> Tensor | None:
    """Output for a few tokens, or None for a model that does not take token ids."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    device = next(model.parameters()).device
    ids = (torch.arange(_PROBE_TOKENS, device=device) * 7 + 3).remainder(vocabulary).unsqueeze(0)
    inputs = {"input_ids": ids}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output[0].float()


def _effect(before: Tensor | None, after: Tensor | None, tensors: dict[str, Tensor]) -> Check:
    if before is None or after is None:
        largest = max(float(v.abs().max()) for k, v in tensors.items() if _is_matrix(k) and v.is_floating_point())
        return Check("has an effect", largest > 0, f"largest entry of its matrices {largest:.3g}")
    change = float((after - before).norm() / before.norm().clamp_min(1e-30))
    if not torch.isfinite(after).all():
        return Check("has an effect", False, "the model's output is not finite with it")
    return Check("has an effect", change > 0, f"changes the output by {change:.2%}" if change else "changes nothing")
