"""GPTQ and AWQ base models, really quantised: calibrated or packed, saved and loaded by GPTQModel and transformers.

GPTQModel 7.6 is the last that takes torch 2.13, and it pins an older numpy, so that it is no dependency of the tests. To
run these: pip install --no-deps --target FOLDER gptqmodel==7.6.0 optimum==2.3.0 device-smi==0.5.7 pypcre==0.6.4
tokenicer==0.0.14 logbar==0.4.15 defuser==0.0.28, and PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gptqmodel", reason="gptqmodel is not installed (it pins an older numpy)")

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

from pica import PicaConfig, export_lora
from pica.adapters.merge import merge_in_full
from pica.basis.fingerprint import decode
from pica.errors import QuantisationError
from pica.experiments.models import locate
from pica.tuners.base.bank import find_banks
from tests.shared import IDS, error, layers_of, logits

GROUP = 32


@pytest.fixture(scope="module")
def folders(tiny_llama, tmp_path_factory) -> dict[str, str]:
    """{kind: checkpoint}, and "" the unquantised one. With biases."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(locate("embedded"))
    plain = tiny_llama(intermediate_size=128, num_hidden_layers=2, attention_bias=True, vocab_size=len(tokenizer))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    plain.save_pretrained(root / "plain")
    config = GPTQConfig(
        bits=4,
        group_size=GROUP,
        tokenizer=tokenizer,
        dataset=["What is seven plus twelve, and what is three times five?"] * 8,
        model_seqlen=32,
    )
    gptq = AutoModelForCausalLM.from_pretrained(root / "plain", device_map="cpu", quantization_config=config)
    gptq.save_pretrained(root / "gptq")
    pack_awq(plain, root / "plain", root / "awq")
    return {"": str(root / "plain"), "gptq": str(root / "gptq"), "awq": str(root / "awq")}


def pack_awq(model: Any, source: Path, target: Path) -> None:
    """An AWQ checkpoint whose codes are rounded to nearest, packed by GPTQModel's own layer: AWQ calibrates on GPUs only."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # pyright: ignore[reportMissingImports]

    state: dict[str, Tensor] = dict(model.state_dict())
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or path == "lm_head":
            continue
        groups = layer.weight.detach().view(layer.out_features, -1, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low) / 15).half().float()
        shape = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
        packed = AwqTorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=False, **shape)
        packed.pack(layer, scales, (-low / scales).round().clamp(0, 15))
        for name in ("weight", "bias"):
            state.pop(f"{path}.{name}", None)
        state.update({f"{path}.{name}": value.contiguous() for name, value in packed.state_dict().items()})
    target.mkdir()
    save_file(state, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    settings = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    config["quantization_config"] = {"quant_method": "awq", **settings, "modules_to_not_convert": ["lm_head"]}
    (target / "config.json").write_text(json.dumps(config))


@pytest.fixture(params=["gptq", "awq"])
def kind(request) -> str:
    return request.param


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def adapted(folder: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(load(folder), PicaConfig(**{"r": 8, "init_weights": False, **settings})).eval()


def test_forward_and_gradients_are_the_formula_on_the_dequantised_weight(folders, kind):
    """y = base(x) + M P x, P from the SVD of the weight; and gradients pass, though the model has run in evaluation."""
    model = adapted(folders[kind])
    plain = load(folders[""])
    logits(model)
    for layer in layers_of(model.train())[:7]:
        assert layer.frozen.quantised_as == kind
        weight = layer.frozen.read().double()
        assert 0.01 < error(weight, plain.get_submodule(layer.path).weight) < 0.3
        x = torch.randn(3, 5, layer.in_features, requires_grad=True)
        y = layer(x)
        bias = getattr(layer.base_layer, "bias", None)
        base = x.detach().double() @ weight.T + (0 if bias is None else bias.detach().double())
        assert error(layer.base_layer(x), base) < 1e-5
        rows = torch.linalg.svd(weight, full_matrices=False)[2][:8]
        used = layer.method.directions(layer.bases.key_of["default"], layer.frozen.read()).double()
        matrix = layer.matrix("default").detach().double()[:, :8]
        update = matrix @ (rows * (used * rows).sum(dim=1, keepdim=True).sign())
        assert error(y - layer.base_layer(x), x.detach().double() @ update.T) < 2e-5
        dy = torch.randn_like(y)
        y.backward(dy)
        assert x.grad is not None
        assert error(x.grad, dy.double() @ (weight + update)) < 2e-5


def test_training_goes_on_after_an_evaluation(folders, kind):
    """GPTQModel's kernels for the CPU turn to inference, for good, in their first evaluation; not under an adapter."""
    model = adapted(folders[kind], init_weights=True)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for step in range(10):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        for parameter in model.parameters():
            assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.abs().max() > 0)
        optimiser.step()
        optimiser.zero_grad()
        if step == 4:
            logits(model.eval())
    assert losses[-1] < 0.6 * losses[0]


def test_a_model_that_has_run_is_refused_for_training(folders, kind):
    model = load(folders[kind])
    logits(model)
    with pytest.raises(QuantisationError, match="has run in evaluation, and GPTQModel has repacked it"):
        get_peft_model(model, PicaConfig(r=8))
    get_peft_model(model, PicaConfig(r=8, inference_mode=True))


def test_saved_exported_and_merged_adapters_compute_the_same(folders, kind, tmp_path):
    model = adapted(folders[kind])
    trained = logits(model)
    assert error(logits(load(folders[kind])), trained) > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    (_, bank), *_ = find_banks(model)
    fingerprint: Any = bank.matrices("default").fingerprint
    assert {p.origin for p in decode(fingerprint.numpy().tobytes())[0].values()} == {kind}
    assert torch.equal(logits(PeftModel.from_pretrained(load(folders[kind]), tmp_path / "adapter")), trained)
    export_lora(model, tmp_path / "lora")
    # without pica GPTQModel's kernel rounds to bfloat16
    lora = PeftModel.from_pretrained(load(folders[kind]), tmp_path / "lora").eval()
    assert error(logits(lora), trained) < 3e-2
    with pytest.raises(QuantisationError, match=f"a {kind} layer cannot be merged into. Merge in full precision"):
        model.merge_adapter()
    merged: Any = merge_in_full(model)
    merged.save_pretrained(tmp_path / "merged")
    plain = load(tmp_path / "merged")
    assert not hasattr(plain.config, "quantization_config")
    assert error(logits(plain), trained) < 1e-5


def test_basis_from_the_unquantised_checkpoint(folders, kind, tmp_path):
    model = adapted(folders[kind], basis_from=folders[""])
    model.save_pretrained(tmp_path)
    on_plain = PeftModel.from_pretrained(load(folders[""]), tmp_path)
    others = {layer.path: layer for layer in layers_of(on_plain)}
    for a in layers_of(model):
        b = others[a.path]
        assert error(a.get_delta_weight("default"), b.get_delta_weight("default")) < 2e-6
