"""Adapters in the reference implementation's format, made here from its description, against W + M V_r^T in float64."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pica
from pica.adapters.reference import import_reference, read_reference
from pica.basis import direction_signs
from pica.errors import AdapterFileError, BasisError, ConfigError
from pica.tuners.pica.layer import PicaLinear

RANK = 10


def save_checkpoint(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A folder as the reference saves it, with matrices for query and value projections unless `changes` says else."""
    generator = torch.Generator().manual_seed(5)
    matrices = {k: 0.1 * torch.randn(out, RANK, generator=generator) for k, out in (("q_proj", 64), ("v_proj", 32))}
    matrices.update(changes.pop("matrices", {}))
    folder.mkdir(exist_ok=True)
    torch.save(matrices, folder / "pica_adapter.bin")
    config = {"target_modules": list(matrices), "rank": RANK, "base_model_name_or_path": "org/base", **changes}
    (folder / "pica_config.json").write_text(json.dumps(config))
    return matrices


def plain_formula(base: nn.Module, matrices: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits of `base` in float64 after W += M V_r^T, V from the full float32 SVD; changes `base`."""
    with torch.no_grad():
        for path, module in base.named_modules():
            keyword = next((k for k in matrices if k in path), None)
            if isinstance(module, nn.Linear) and keyword:
                right = torch.linalg.svd(module.weight.float(), full_matrices=False)[2][:RANK]
                module.weight.data = module.weight.data.double() + matrices[keyword].double() @ right.double()
        return base.double()(input_ids=tokens).logits


def test_logits_equal_the_plain_formula(tiny_llama, tokens, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    matrices = save_checkpoint(tmp_path / "ref")
    with caplog.at_level(logging.WARNING, logger="pica"):
        model = pica.import_reference(tiny_llama(), tmp_path / "ref", svd_device="cpu")
    assert "signs" in caplog.text
    assert "--svd-device" in caplog.text
    with torch.no_grad():
        found = model(input_ids=tokens).logits
        without = tiny_llama()(input_ids=tokens).logits
    wanted = plain_formula(tiny_llama(), matrices, tokens)
    assert float((found - wanted).abs().max()) < 1e-4
    assert float((without - wanted).abs().max()) > 0.5
    config = model.peft_config["default"]
    assert config.save_basis is True  # pyright: ignore[reportAttributeAccessIssue]
    assert config.target_modules == {"q_proj", "v_proj"}  # pyright: ignore[reportAttributeAccessIssue]
    assert config.base_model_name_or_path == "org/base"
    assert not model.training


def test_signs_are_those_of_the_decomposition(tiny_llama, tokens, tmp_path: Path) -> None:
    """The test above could not fail if this library's sign rule agreed with the routine's: it does not."""
    matrices = save_checkpoint(tmp_path / "ref")
    model = import_reference(tiny_llama(), tmp_path / "ref")
    layers = [m for m in model.modules() if isinstance(m, PicaLinear)]
    assert len(layers) == 6
    signs = torch.cat(
        [direction_signs(m.method.directions(m.bases.key_of["default"], m.frozen.read())) for m in layers]
    )
    assert 0 < int((signs < 0).sum()) < len(signs)
    wanted = plain_formula(tiny_llama(), matrices, tokens)
    ours = pica.PicaConfig(r=RANK, target_modules=["q_proj", "v_proj"])
    from peft import get_peft_model

    oriented = get_peft_model(tiny_llama(), ours)
    for layer in (m for m in oriented.modules() if isinstance(m, PicaLinear)):
        layer.matrix("default").data.copy_(matrices[layer.path.rpartition(".")[2]])
    with torch.no_grad():
        assert float((oriented(input_ids=tokens).logits - wanted).abs().max()) > 0.5


def test_first_keyword_that_is_a_substring_wins(tiny_llama, tokens, tmp_path: Path) -> None:
    wide = torch.randn(64, RANK, generator=torch.Generator().manual_seed(1)) * 0.1
    matrices = save_checkpoint(tmp_path / "ref", matrices={"v_proj": wide, "proj": torch.full((64, RANK), 0.03)})
    base = tiny_llama(num_key_value_heads=4, intermediate_size=64)  # every projection is 64 wide
    model = import_reference(base, tmp_path / "ref")
    groups = {m.path: m.group_of["default"] for m in model.modules() if isinstance(m, PicaLinear)}
    assert len(groups) == 3 * 7
    assert {groups[f"model.layers.{i}.self_attn.q_proj"] for i in range(3)} == {"q_proj-64"}
    assert {groups[f"model.layers.{i}.mlp.down_proj"] for i in range(3)} == {"proj-64"}
    wanted = plain_formula(tiny_llama(num_key_value_heads=4, intermediate_size=64), matrices, tokens)
    with torch.no_grad():
        assert float((model(input_ids=tokens).logits - wanted).abs().max()) < 1e-3


def test_half_precision_matrices_and_unused_keywords(
    tiny_llama, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(
        tmp_path / "ref",
        matrices={"q_proj": torch.ones(64, RANK, dtype=torch.bfloat16), "v_proj": torch.zeros(32, RANK)},
        target_modules=["q_proj", "v_proj", "fc1"],  # fc1 matches nothing there and has no matrix
    )
    model = import_reference(tiny_llama(), tmp_path / "ref")
    layer = next(m for m in model.modules() if isinstance(m, PicaLinear))
    assert layer.matrix("default").dtype == torch.float32
    save_checkpoint(tmp_path / "ref", matrices={"query": torch.ones(64, RANK)})
    with caplog.at_level(logging.WARNING, logger="pica"):
        import_reference(tiny_llama(), tmp_path / "ref")
    assert "query" in caplog.text


def test_imported_adapter_can_be_exported(tiny_llama, tokens, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ref")
    model = import_reference(tiny_llama(), tmp_path / "ref")
    done = pica.export_lora(model, tmp_path / "lora")
    assert done.check is not None
    assert done.check.logits < 1e-4 < done.check.effect


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('code of the file was run')",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "pica_config.json").unlink(), "holds no pica_config.json"),
        (lambda d: (d / "pica_adapter.bin").unlink(), "holds no pica_adapter.bin"),
        (lambda d: (d / "pica_config.json").write_text("{"), "not readable JSON"),
        (lambda d: (d / "pica_config.json").write_text("[]"), "a JSON object"),
        (lambda d: save_checkpoint(d, rank="10"), "rank='10'"),
        (lambda d: save_checkpoint(d, rank=9), r"shape \(64, 10\) where \(out, 9\)"),
        (lambda d: save_checkpoint(d, target_modules=[]), r"target_modules=\[\]"),
        (lambda d: save_checkpoint(d, target_modules=["q_proj"]), "v_proj, which target_modules"),
        (lambda d: save_checkpoint(d, target_modules=["q_proj", "v_proj", "k_proj"]), "no matrix for 'k_proj'"),
        (
            lambda d: save_checkpoint(d, matrices={"q_proj": torch.zeros(48, RANK)}),
            "does not fit the matrix of 'q_proj'",
        ),
        (lambda d: save_checkpoint(d, matrices={"q_proj": torch.full((64, RANK), torch.nan)}), "NaN"),
        (lambda d: save_checkpoint(d, matrices={"q_proj": torch.zeros(64, RANK, 1)}), r"shape \(64, 10, 1\)"),
        (lambda d: save_checkpoint(d, matrices={"q_proj": [1.0]}), "no matrix of a keyword"),
        (lambda d: torch.save(torch.zeros(2), d / "pica_adapter.bin"), "dictionary from keyword to matrix"),
        (lambda d: torch.save({"q_proj": Malicious()}, d / "pica_adapter.bin"), "weights_only=True"),
        (lambda d: (d / "pica_adapter.bin").write_bytes(b"junk" * 10), "weights_only=True"),
        (lambda d: (d / "pica_adapter.bin").write_bytes(b""), "weights_only=True"),
    ],
)
def test_wrong_folders_are_one_clear_error(tiny_llama, tmp_path: Path, spoil: Any, message: str) -> None:
    save_checkpoint(tmp_path / "ref")
    spoil(tmp_path / "ref")
    base = tiny_llama()
    with pytest.raises(AdapterFileError, match=message):
        import_reference(base, tmp_path / "ref")
    assert not any(isinstance(m, PicaLinear) for m in base.modules())  # the model is as it was


def test_other_models_and_devices_are_refused(tiny_llama, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ref")
    with pytest.raises(AdapterFileError, match="does not exist"):
        read_reference(tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match="no linear layer whose path contains 'q_proj' or 'v_proj'"):
        import_reference(nn.Sequential(nn.Linear(4, 4)), tmp_path / "ref")
    with pytest.raises(ConfigError, match="svd_device='quantum'"):
        import_reference(tiny_llama(), tmp_path / "ref", svd_device="quantum")
    broken = tiny_llama()
    broken.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(BasisError, match=r"layers\.0\.self_attn\.q_proj"):
        import_reference(broken, tmp_path / "ref")
