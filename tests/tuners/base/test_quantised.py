"""Quantised base models, really quantised: by bitsandbytes, torchao and HQQ, on the CPU."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.integrations.bitnet import AutoBitLinear
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.integrations.gemma_quant import QuantizedLinear

import pica.tuners.base.quantised
from pica import PicaConfig, SvftConfig, export_lora
from pica.basis import checkpoint as checkpoints
from pica.basis.fingerprint import decode
from pica.calibration.making import make_basis
from pica.errors import BasisMismatchError, ConfigError, QuantisationError, TargetError
from pica.tuners.base.bank import find_banks
from pica.tuners.base.frozen_weight import FrozenWeight
from pica.tuners.pica.layer import PicaLinear
from tests.quantising import KINDS, WEIGHT_ONLY, WEIGHT_ONLY_NAMES, load_quantised
from tests.shared import IDS, error, layers_of, logits

SETTINGS: dict[str, Any] = {"r": 8, "init_weights": False, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory) -> str:
    """The unquantised model. Widths that bitsandbytes' blocks of 64 divide."""
    path = tmp_path_factory.mktemp("base")
    tiny_llama(intermediate_size=128, num_hidden_layers=2).save_pretrained(path)
    return str(path)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def load(folder: str, kind: str | None = None, **more: Any) -> Any:
    return load_quantised(folder, kind, **more)


def adapted(folder: str, kind: str | None, **settings: Any) -> Any:
    if kind is not None and kind.endswith("dynamic"):
        settings["inference_mode"] = True  # such layers have no backward pass, and training over them is refused
    torch.manual_seed(0)
    return get_peft_model(load(folder, kind), PicaConfig(**{**SETTINGS, **settings})).eval()


def directions(weight: Tensor, rank: int) -> Tensor:
    """P of a weight, by the plain definition, float64."""
    return torch.linalg.svd(weight.double(), full_matrices=False)[2][:rank]


def formula(layer: PicaLinear, rows: Tensor) -> Tensor:
    """dW = M P for P `rows` up to signs, which are the layer's own: float64."""
    used = layer.method.directions(layer.bases.key_of["default"], layer.frozen.read()).double()
    signs = (used * rows).sum(dim=1).sign()
    return layer.matrix("default").detach().double()[:, : len(rows)] @ (rows * signs[:, None])


# ---- the update -------------------------------------------------------------------------------------------------------


def test_forward_and_gradients_are_the_formula_on_the_dequantised_weight(folder, kind):
    """y = base(x) + M P x with P from the SVD of the dequantised weight; gradients of M and x, in float64."""
    model = adapted(folder, kind).train()  # in evaluation bitsandbytes' int8 rounds the input as well
    for layer in layers_of(model)[:7]:
        weight = layer.frozen.read().double()
        assert weight.shape == (layer.out_features, layer.in_features)
        update = formula(layer, directions(weight, 8))
        x = torch.randn(3, 5, layer.in_features, requires_grad=True)
        y = layer(x)
        base = layer.base_layer(x).detach().double()
        assert error(base, x.detach().double() @ weight.T) < (2e-2 if kind.endswith("dynamic") else 1e-5)
        assert error(y - base, x.detach().double() @ update.T) < 2e-5
        if kind.endswith("dynamic"):
            continue  # such layers have no backward pass; they are refused for training, see below
        dy = torch.randn_like(y)
        y.backward(dy)
        assert x.grad is not None
        assert error(x.grad, dy.double() @ (weight + update)) < 2e-5
        h = x.detach().double() @ (torch.linalg.pinv(layer.matrix("default").detach().double()) @ update).T
        (gradient,) = (layer.matrix("default").grad,)
        assert gradient is not None
        assert error(gradient, dy.double().flatten(0, 1).T @ h.flatten(0, 1)) < 2e-5
        layer.matrix("default").grad = None  # shared between layers


def test_the_side_follows_how_exact_the_layers_output_is(folder, kind):
    """Wide layers read their own output; where a layer rounds its input, that would amplify noise, so they do not."""
    sides = {layer.bases.side("principal") for layer in layers_of(adapted(folder, kind)) if "down_proj" in layer.path}
    assert sides == {"out" if kind in WEIGHT_ONLY_NAMES else "in"}


def test_no_forward_pass_dequantises_for_the_adapter(folder, kind, monkeypatch):
    model = adapted(folder, kind)
    for name in ("dequantised", "_by_forward"):
        monkeypatch.setattr(pica.tuners.base.quantised, name, pytest.fail)
    monkeypatch.setattr(FrozenWeight, "read", pytest.fail)
    logits(model)
    if not kind.endswith("dynamic"):
        model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("kind", WEIGHT_ONLY + ["bnb int8"])
def test_training_reaches_what_the_unquantised_model_reaches(folder, kind):
    """Ten steps lower the loss about as they do without quantisation, through an evaluation in the middle."""
    ends = []
    for base in (None, kind):
        model = adapted(folder, base, init_weights=True)
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        losses = []
        for step in range(10):
            loss = model.train()(IDS, labels=IDS).loss
            loss.backward()
            losses.append(loss.item())
            optimiser.step()
            optimiser.zero_grad()
            if step == 4:
                logits(model.eval())
        ends.append((losses[0], losses[-1]))
    (first, last), (quantised_first, quantised_last) = ends
    assert last < 0.6 * first
    assert quantised_last < quantised_first - 0.8 * (first - last)


def test_half_precision_models_compute_in_their_dtype(folder):
    model = load(folder, "bnb nf4", dtype=torch.bfloat16)
    model = get_peft_model(model, PicaConfig(**SETTINGS)).eval()
    layer = layers_of(model)[0]
    assert layer.method.require("principal").dtype == torch.bfloat16
    assert layer.matrix("default").dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


# bnb's int8 mixes the samples of a batch
@pytest.mark.parametrize("kind", ["bnb nf4", "torchao int4", "torchao int8", "hqq int4"])
def test_several_adapters_mixed_batches_and_disabling(folder, kind):
    base = logits(load(folder, kind))
    model = adapted(folder, kind)
    torch.manual_seed(1)
    model.add_adapter("other", PicaConfig(**{**SETTINGS, "r": 5}))
    alone = {name: (model.set_adapter(name), logits(model))[1] for name in ("default", "other")}
    mixed = logits(model, adapter_names=["other", "__base__", "default"])
    assert torch.allclose(mixed[0], alone["other"][0], atol=1e-5)
    assert torch.allclose(mixed[1], base[1], atol=1e-5)
    assert torch.allclose(mixed[2], alone["default"][2], atol=1e-5)
    assert error(alone["other"], alone["default"]) > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


# ---- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_adapter_computes_the_same_bit_for_bit(folder, kind, tmp_path):
    model = adapted(folder, kind)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the very same base: nothing to be warned of
        loaded = PeftModel.from_pretrained(load(folder, kind), str(tmp_path))
    assert torch.equal(logits(loaded), trained)


def test_the_fingerprint_records_whose_weights(folder, kind):
    origin = kind if kind.startswith("bnb") else kind.split()[0]
    assert origins(adapted(folder, kind)) == {origin.removesuffix(" double")}
    assert origins(adapted(folder, kind, basis_from=folder)) == {"a named checkpoint"}
    assert origins(adapted(folder, None, basis_from=folder)) == {""}


def origins(model: nn.Module) -> set[str]:
    (_, bank), *_ = find_banks(model)
    fingerprint = bank.matrices("default").fingerprint
    assert fingerprint is not None
    return {found.origin for found in decode(fingerprint.numpy().tobytes())[0].values()}


@pytest.mark.parametrize(("trained_on", "loaded_on"), list(itertools.permutations([None, "bnb nf4", "bnb fp4"], 2)))
def test_another_quantisation_is_refused_with_the_way_out(folder, trained_on, loaded_on, tmp_path):
    adapted(folder, trained_on).save_pretrained(tmp_path)
    with pytest.raises(BasisMismatchError) as caught:
        PeftModel.from_pretrained(load(folder, loaded_on), str(tmp_path))
    words = {None: "unquantised", "bnb nf4": "dequantised bnb nf4", "bnb fp4": "dequantised bnb fp4"}
    said = f"trained on float32 {words[trained_on]} weights, these are float32 {words[loaded_on]}"
    assert said in str(caught.value)
    assert ("basis_from" if trained_on is None else "load the base model quantised as then") in str(caught.value)


# ---- basis_from -------------------------------------------------------------------------------------------------------


def test_basis_from_is_the_basis_of_the_named_weights(folder, kind):
    """P from the unquantised weights, on the input side: the quantised layer's output is of another W."""
    plain = load(folder)
    model = adapted(folder, kind, basis_from=folder)
    for layer in layers_of(model)[:5]:
        rows = directions(plain.get_submodule(layer.path).weight.detach(), 8)
        x = torch.randn(4, layer.in_features)
        with torch.no_grad():
            change = layer(x) - layer.base_layer(x)
        assert error(change, x.double() @ formula(layer, rows).T) < 2e-5


@pytest.mark.parametrize("kind", ["bnb nf4", "torchao int4", "hqq int4"])
def test_adapters_go_between_the_quantised_and_the_unquantised_base(folder, kind, tmp_path):
    """The same basis, so the same update: trained on either, loaded on the other."""
    on_quantised = adapted(folder, kind, basis_from=folder)
    on_quantised.save_pretrained(tmp_path / "quantised")
    on_plain = PeftModel.from_pretrained(load(folder), str(tmp_path / "quantised"))
    for a, b in zip(layers_of(on_quantised), layers_of(on_plain)):
        assert error(a.get_delta_weight("default"), b.get_delta_weight("default")) < 2e-6
    assert {layer.bases.side(layer.bases.key_of["default"]) for layer in layers_of(on_plain)} == {"in", "out"}

    adapted(folder, None).save_pretrained(tmp_path / "plain")
    config = PicaConfig.from_pretrained(tmp_path / "plain")
    config.basis_from = folder
    back = PeftModel.from_pretrained(load(folder, kind), str(tmp_path / "plain"), config=config)
    for a, b in zip(layers_of(back), layers_of(on_plain)):
        assert error(a.get_delta_weight("default"), b.get_delta_weight("default")) < 2e-6


def test_an_adapter_whose_checkpoint_has_moved(folder, tmp_path):
    """The unquantised base is that checkpoint, and a stored basis needs none; else the error says what to set."""
    gone = tmp_path / "gone"
    load(folder).save_pretrained(gone)
    trained = adapted(folder, "bnb nf4", basis_from=str(gone))
    trained.save_pretrained(tmp_path / "adapter")
    stored = adapted(folder, "bnb nf4", basis_from=str(gone), save_basis=True)
    stored.save_pretrained(tmp_path / "stored")
    for path in gone.iterdir():
        path.unlink()
    gone.rmdir()
    on_plain = PeftModel.from_pretrained(load(folder), str(tmp_path / "adapter"))
    for a, b in zip(layers_of(trained), layers_of(on_plain)):
        assert error(a.get_delta_weight("default"), b.get_delta_weight("default")) < 2e-6
    again = PeftModel.from_pretrained(load(folder, "bnb nf4"), str(tmp_path / "stored"))
    assert torch.equal(logits(again), logits(stored))
    with pytest.raises(ConfigError, match=r"There is no model folder .* Set basis_from in the configuration"):
        PeftModel.from_pretrained(load(folder, "bnb nf4"), str(tmp_path / "adapter"))


def test_only_the_adapted_tensors_are_read_one_at_a_time(folder, monkeypatch):
    read: list[str] = []
    held = checkpoints.WeightFolder.load
    monkeypatch.setattr(checkpoints.WeightFolder, "load", lambda self, name: (read.append(name), held(self, name))[1])
    adapted(folder, "bnb nf4", basis_from=folder, target_modules=["k_proj"])
    assert set(read) == {f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2)}


def test_a_checkpoint_saved_without_its_head_serves(folder, tmp_path):
    load(folder).model.save_pretrained(tmp_path)
    assert origins(adapted(folder, "bnb nf4", basis_from=str(tmp_path))) == {"a named checkpoint"}


@pytest.mark.parametrize(
    ("change", "target", "said"),
    [
        ({"seed": 1}, "q_proj", r"is not this base model before quantisation: .* differs by 1\d\d% of its norm"),
        (
            {"intermediate_size": 192},
            "up_proj",
            r"proj.weight is \(.*192.*name the unquantised checkpoint of the same model",
        ),
        ({"num_hidden_layers": 1}, "q_proj", r"has no weight for model.layers.1.self_attn.q_proj; name"),
    ],
)
def test_another_models_checkpoint_is_refused(folder, tiny_llama, tmp_path, change, target, said):
    sizes = {"intermediate_size": 128, "num_hidden_layers": 2, **change}
    tiny_llama(**sizes).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=said):
        adapted(folder, "bnb nf4", basis_from=str(tmp_path), target_modules=[target])


def test_a_quantised_or_absent_checkpoint_is_refused(folder, tmp_path):
    load(folder, "bnb int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(ConfigError, match=r"is quantised itself \(.*int8\); name the unquantised one"):
        adapted(folder, "bnb int8", basis_from=str(tmp_path / "int8"))
    with pytest.raises(ConfigError, match="There is no model folder"):
        adapted(folder, "bnb int8", basis_from=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="basis_from=7 must be a folder or the name"):
        PicaConfig(basis_from=7)  # pyright: ignore[reportArgumentType]


def test_the_cache_tells_the_sources_apart(folder, tmp_path, monkeypatch):
    """Quantised, named and both once more from the cache: the same numbers as without it."""
    monkeypatch.setattr("pica.basis.cache.SMALLEST_ELEMENTS", 1)
    wanted = {source: logits(adapted(folder, "bnb nf4", basis_from=source)) for source in (None, folder)}
    assert error(wanted[None], wanted[folder]) > 1e-3
    monkeypatch.setenv("PICA_CACHE_DIR", str(tmp_path))
    for source in (None, folder, None, folder):
        assert torch.equal(logits(adapted(folder, "bnb nf4", basis_from=source)), wanted[source])


# ---- merging ----------------------------------------------------------------------------------------------------------


def test_merging_quantises_the_sum_and_unmerging_is_exact(folder, kind):
    """|merged - (W + dW)| is at most what quantisation itself costs; unmerged it is as it was, bit for bit."""
    model = adapted(folder, kind)
    with torch.no_grad():
        for bank in [bank for _, bank in find_banks(model)]:
            for matrix in bank.matrices("default").values():
                matrix *= 0.2
    before = logits(model)
    sums = [layer.frozen.read() + layer.get_delta_weight("default") for layer in layers_of(model)]
    with pytest.warns(UserWarning, match="quantises the merged weight again"):
        model.merge_adapter()
    for layer, wanted in zip(layers_of(model), sums):
        backend: Any = layer.quantization_backend
        merged = pica.tuners.base.quantised.dequantised(
            layer.get_base_layer(), backend, layer.in_features, torch.float32
        )
        assert ((merged - wanted).abs() <= step(kind, wanted)).all()
        assert error(merged, wanted) > 1e-4  # it was quantised
    assert error(logits(model), before) < 0.5
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def step(kind: str, weight: Tensor) -> Tensor:
    """Largest rounding error of each entry: half the widest gap of the code, times the scale of its block."""
    rows, columns = weight.shape
    size = {"bnb": 64, "torchao": 32, "hqq": 64}[kind.split()[0]] if "8" not in kind else columns
    scale = weight.reshape(-1, size).abs().amax(dim=1, keepdim=True).expand(-1, size).reshape(rows, columns)
    # hqq: 2/15 between codes, and it moves a block's zero by up to half of that and more
    gaps = {"hqq": 3 / 15, "int8": 1 / 127, "float8": 1 / 14, "int4": 1 / 7, "nf4": 0.304, "fp4": 0.334}
    gap = next(value for name, value in gaps.items() if name in kind)
    return scale * (0.5 * gap * 1.02 + (0.02 if "double" in kind else 1e-3))


def test_a_second_adapter_over_a_merged_one(folder):
    """Its basis is of the unmerged weights, and both merge from there."""
    model = adapted(folder, "bnb nf4")
    plain = {layer.path: layer.frozen.read() for layer in layers_of(model)}
    with pytest.warns(UserWarning, match="quantises"):
        model.merge_adapter()
    model.add_adapter("second", PicaConfig(**SETTINGS))
    for layer in layers_of(model):
        assert torch.equal(layer.frozen.read(), plain[layer.path])
        assert layer.bases.key_of["second"] == layer.bases.key_of["default"]
    model.unmerge_adapter()
    for layer in layers_of(model):
        assert torch.equal(layer.frozen.read(), plain[layer.path])


@pytest.mark.parametrize("kind", ["bnb nf4", "torchao int8", "hqq int4"])
def test_adapters_merged_one_after_the_other_are_quantised_as_all_at_once(folder, kind):
    model = adapted(folder, kind)
    model.add_adapter("second", PicaConfig(**SETTINGS))
    with pytest.warns(UserWarning, match="quantises"):
        model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    found = logits(model)
    model.unmerge_adapter()
    model.merge_adapter(["default", "second"])
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize("kind", ["bnb nf4", "bnb int8", "torchao int8", "hqq int4"])
def test_merge_and_unload_leaves_a_quantised_model(folder, kind):
    model = adapted(folder, kind)
    kinds = {type(layer.get_base_layer()) for layer in layers_of(model)}
    with pytest.warns(UserWarning, match="quantises"):
        model.merge_adapter()
    merged = logits(model)
    plain = model.merge_and_unload()
    assert not layers_of(plain)
    assert type(plain.model.layers[0].mlp.up_proj) in kinds
    assert torch.equal(logits(plain), merged)


def test_a_merge_keeps_the_bias_of_an_hqq_layer(tiny_llama, tmp_path):
    """PEFT puts a new layer in the old one's place, without its bias."""
    pytest.importorskip("hqq", reason="hqq is not installed")
    plain = tiny_llama(intermediate_size=128, num_hidden_layers=1, attention_bias=True)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    plain.save_pretrained(tmp_path)
    model = adapted(str(tmp_path), "hqq int4")
    biases = {layer.path: layer.get_base_layer().bias for layer in layers_of(model)}
    before = logits(model)
    with pytest.warns(UserWarning, match="quantises"):
        model.merge_adapter()
    for layer in layers_of(model):
        base: Any = layer.get_base_layer()
        assert (base.bias is None) == ("mlp" in layer.path)
        assert base.bias is biases[layer.path]
        assert not base.training
        x = torch.randn(2, layer.in_features)
        wanted = x @ base.dequantize().T + (0 if base.bias is None else base.bias)
        assert error(layer(x), wanted) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_a_merge_that_cannot_be_quantised_leaves_the_layer_alone(folder, monkeypatch):
    model = adapted(folder, "torchao int8")
    before = logits(model)
    layer = layers_of(model)[0]
    monkeypatch.setattr(layer.quantization_backend, "get_apply_tensor_subclass", lambda: object())
    said = "could not be quantised again as torchao"
    with pytest.raises(QuantisationError, match=said), pytest.warns(UserWarning, match="quantises the merged"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(logits(model), before)


def test_torchao_layers_quantised_by_hand_adapt_but_do_not_merge(tiny_llama):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base = tiny_llama()
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    model = get_peft_model(base, PicaConfig(**SETTINGS)).eval()
    logits(model)
    with pytest.raises(QuantisationError, match="torchao layer cannot be merged into"):
        model.merge_adapter()


# ---- export -----------------------------------------------------------------------------------------------------------


def test_the_lora_export_computes_the_same_on_the_quantised_base(folder, kind, tmp_path):
    """Its factors are M and P themselves, so PEFT's LoRA on the same quantised base gives the same outputs."""
    model = adapted(folder, kind)
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(load(folder, kind), str(tmp_path / "lora")).eval()
    assert error(logits(lora), logits(model)) < 1e-5
    assert error(logits(load(folder, kind)), logits(model)) > 1e-2


# ---- what is refused --------------------------------------------------------------------------------------------------


def test_training_over_layers_without_a_backward_pass_is_refused(folder):
    model = load(folder, "torchao int8 dynamic")
    with pytest.raises(QuantisationError, match="quantised by torchao with its activations, and such layers pass no"):
        get_peft_model(model, PicaConfig(r=8))


class OtherBackend(ForwardOnlyQuantizationBackend):
    layer_type = "linear"


def fine_grained_fp8(plain: nn.Linear) -> nn.Module:
    made = FP8Linear(plain.in_features, plain.out_features, block_size=(64, 64))
    made.weight = nn.Parameter(plain.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return made


def bitnet(plain: nn.Linear) -> nn.Module:
    made = AutoBitLinear(plain.in_features, plain.out_features, bias=False, online_quant=True)
    made.weight = plain.weight
    return made


def gemma(plain: nn.Linear) -> nn.Module:
    return QuantizedLinear(plain.in_features, plain.out_features, num_bits=4)


def torchao_qat(plain: nn.Linear) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    qat = pytest.importorskip("torchao.quantization.qat", reason="torchao is not installed")
    holder = nn.Sequential(plain)
    torchao.quantize_(holder, qat.QATConfig(torchao.Int8DynamicActivationIntxWeightConfig(), step="prepare"))
    return holder[0]


def quanto(plain: nn.Linear) -> nn.Module:
    library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    holder = nn.Sequential(plain)
    library.quantize(holder, weights=library.qint8)
    library.freeze(holder)
    return holder[0]


def compressed_tensors(plain: nn.Linear) -> nn.Module:
    library: Any = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    holder = nn.Sequential(plain)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=library.QuantizationArgs(num_bits=8))
    library.apply_quantization_config(holder, library.QuantizationConfig(config_groups={"all": scheme}))
    return holder[0]


@pytest.mark.parametrize("config", [PicaConfig, SvftConfig])
@pytest.mark.parametrize("make", [fine_grained_fp8, bitnet, gemma, torchao_qat, quanto, compressed_tensors])
def test_other_kinds_are_refused_in_one_sentence(tiny_llama, make, config):
    """Some of their layers hold a plain weight, but compute with another one."""
    model = tiny_llama()
    layer = make(model.model.layers[1].mlp.up_proj)
    model.model.layers[1].mlp.up_proj = layer
    with pytest.raises(
        TargetError, match=rf"up_proj \({type(layer).__name__}\) is not supported: it is quantised in a way that is not"
    ):
        get_peft_model(model, config(target_modules=["up_proj"]))
    assert not find_banks(model)


def test_a_quantised_embedding_is_refused(tiny_llama):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny_llama()
    plain = model.model.embed_tokens
    made = bnb.nn.Embedding8bit(plain.num_embeddings, plain.embedding_dim)
    made.load_state_dict(plain.state_dict())
    model.model.embed_tokens = made.to("cpu")
    with pytest.raises(TargetError, match=r"embed_tokens \(Embedding8bit\) is not supported: it is quantised in a way"):
        get_peft_model(model, PicaConfig(target_modules=["embed_tokens"]))


def test_a_checkpoint_that_transformers_dequantises_is_a_plain_model(folder, tmp_path):
    """Fine-grained FP8 on a CPU: what is adapted is what the file's codes and scales say."""
    state = load(folder).state_dict()
    wanted = {}
    for name in [name for name in state if name.endswith("proj.weight")]:
        weight = state[name]
        scale = weight.abs().max() / 448
        state[name] = (weight / scale).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale.reshape(1, 1)
        wanted[name.removesuffix(".weight")] = state[name].float() * scale
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((Path(folder) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if torch.cuda.is_available():
        pytest.skip("on a GPU it stays quantised")
    model = get_peft_model(load(str(tmp_path)), PicaConfig(**SETTINGS)).eval()
    for layer in layers_of(model):
        assert layer.frozen.quantised_as == ""
        assert error(layer.frozen.read(), wanted[layer.path]) < 1e-6
    before = logits(model)
    assert error(logits(model.merge_and_unload()), before) < 1e-5


def test_kinds_that_only_run_forward_have_their_weight_from_there(tiny_llama, monkeypatch):
    """GPTQ, AWQ and their like: the answers to the unit vectors are the weight; merging is refused."""
    plain = tiny_llama(attention_bias=True)
    layer = plain.model.layers[0].self_attn.k_proj
    with torch.no_grad():
        layer.bias.normal_()
    ordinary = pica.tuners.base.quantised.resolve_quantization_backend
    for name, supported in (("gptq", True), ("te", False)):
        model = copy.deepcopy(plain)
        opaque = model.model.layers[0].self_attn.k_proj

        def resolve(base: nn.Module, opaque=opaque, name=name, **kwargs: Any) -> Any:
            return OtherBackend(name) if base is opaque else ordinary(base, **kwargs)

        monkeypatch.setattr(pica.tuners.base.quantised, "resolve_quantization_backend", resolve)
        if not supported:
            with pytest.raises(TargetError, match="it is quantised by te, which is not supported"):
                get_peft_model(model, PicaConfig(target_modules=["k_proj"]))
            continue
        tuned = get_peft_model(model, PicaConfig(r=8, target_modules=["k_proj"]))
        found = layers_of(tuned)[0]
        assert found.frozen.quantised_as == "gptq"
        assert error(found.frozen.read(), layer.weight.detach()) < 1e-5
        with pytest.raises(QuantisationError, match="a gptq layer cannot be merged into"):
            tuned.merge_adapter()


# ---- SVFT, and bitsandbytes' repacking ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bnb nf4", "bnb int8", "torchao int4", "hqq int4"])
def test_svft_takes_its_singular_vectors_from_the_dequantised_weight(folder, kind, tmp_path):
    torch.manual_seed(0)
    config = SvftConfig(pattern="banded", off_diagonals=1, init_weights=False)
    model: Any = get_peft_model(load(folder, kind), config).eval()
    trained = logits(model)
    assert error(trained, logits(load(folder, kind))) > 1e-2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, kind), str(tmp_path))
    assert torch.equal(logits(loaded), trained)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(4, layer.in_features)
    with torch.no_grad():
        change = layer(x) - layer.base_layer(x)
    left, _, right = torch.linalg.svd(layer.frozen.read().double(), full_matrices=False)
    core = left.T @ layer.get_delta_weight("default").double() @ right.T  # banded in the singular basis
    band = torch.ones_like(core).tril(1).triu(-1)
    assert error(core * band, core) < 1e-4
    assert error(change, x.double() @ layer.get_delta_weight("default").double().T) < 1e-4


def test_a_layer_that_bitsandbytes_has_repacked_is_put_back(folder):
    """An evaluation before the adapter: on CPUs with AVX512-BF16 the layers are packed anew then, without a gradient."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes leaves the weights as they are")
    wanted = load(folder, "bnb nf4")
    model = load(folder, "bnb nf4")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    logits(model)
    packed = model.model.layers[0].mlp.gate_proj
    assert packed.weight.quant_state.packing_format_for_cpu
    tuned = get_peft_model(model, PicaConfig(r=8, init_weights=False))
    for name, module in wanted.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            unpacked: Any = model.get_submodule(name)
            unpacked = unpacked.get_base_layer() if isinstance(unpacked, PicaLinear) else unpacked
            found = bnb.functional.dequantize_4bit(unpacked.weight.data, unpacked.weight.quant_state)
            expected = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert error(found, expected) < 2**-8
    logits(tuned.eval())
    tuned.train()(IDS, labels=IDS).loss.backward()
    first = next(p for p in tuned.parameters() if p.requires_grad)
    assert first.grad is not None
    assert first.grad.abs().max() > 0


# ---- a basis that a file brings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["activation", "gradient"])
def test_one_basis_file_serves_the_quantised_and_the_unquantised_model(folder, kind, tmp_path, projection):
    """Directions of data are no weight's: both use the very same ones."""
    wanted = PicaConfig(**{**SETTINGS, "projection": projection})
    made = make_basis(load(folder), tmp_path / "basis", wanted, data=[{"input_ids": IDS}])
    settings = {"projection": projection, "basis_from": str(tmp_path / "basis"), "init_weights": False}
    on_quantised, plain = adapted(folder, kind, **settings), adapted(folder, None, **settings)
    for layer, other in zip(layers_of(on_quantised), layers_of(plain)):
        width = layer.out_features if layer.path in made.about.input_side else layer.in_features
        rows = made.rows(layer.path, SETTINGS["r"], width)
        for one in (layer, other):
            assert torch.equal(
                one.method.first_directions("default").float(), rows.to(one.frozen.device_and_dtype()[1])
            )
    trained = logits(on_quantised)
    on_quantised.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder, kind), str(tmp_path / "a"))), trained)


def test_directions_of_the_gradient_can_be_made_of_a_quantised_model(folder, kind, tmp_path):
    """From what goes in and comes back at each layer; packed weights have no gradient of their own."""
    wanted = PicaConfig(**{**SETTINGS, "projection": "gradient"})
    if kind == "torchao int8 dynamic":
        with pytest.raises(QuantisationError, match="such layers pass no gradient on"):
            make_basis(load(folder, kind), tmp_path / "quantised", wanted, data=[{"input_ids": IDS}])
        return
    made = make_basis(load(folder, kind), tmp_path / "quantised", wanted, data=[{"input_ids": IDS}])
    plain = make_basis(load(folder), tmp_path / "plain", wanted, data=[{"input_ids": IDS}])
    for path, layer in ((layer.path, layer) for layer in layers_of(adapted(folder, None))):
        width = layer.out_features if path in made.about.input_side else layer.in_features
        one, other = (basis.rows(path, SETTINGS["r"], width) for basis in (made, plain))
        shared, chance = float(torch.linalg.vector_norm(one @ other.T) ** 2) / len(one), len(one) / width
        assert shared - chance > 0.25 * (1 - chance), path  # four bits of a model that has learnt nothing
