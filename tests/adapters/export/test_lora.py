"""Exact and truncated LoRA export, held against PEFT, dense algebra and a process that has no pica."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import pica
from pica.adapters.export import check as lora_check
from pica.adapters.export.lora import export_lora
from pica.errors import AdapterFileError, ConfigError, ExportError, OutputError, RankError
from pica.tuners.pica.layer import PicaLinear
from tests.families import inputs_of, make

from ..conftest import adapted


def dense_updates(folder: Path) -> dict[str, torch.Tensor]:
    """{path: alpha / r * B A} from the files alone, float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    updates = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            updates[path] = scale * b.double() @ a.double()
    return updates


def pica_layers(model: nn.Module) -> dict[str, PicaLinear]:
    return {m.path: m for m in model.modules() if isinstance(m, PicaLinear)}


@pytest.mark.parametrize(
    ("dtype", "layer_bound", "logit_bound"),
    [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-2, 5e-3), (torch.float16, 2e-3, 5e-4)],
    ids=["float32", "bfloat16", "float16"],
)
def test_exact_export_gives_the_same_updates_and_logits(
    pica_llama, tmp_path: Path, dtype: torch.dtype, layer_bound: float, logit_bound: float
) -> None:
    model = pica_llama(dtype)
    done = export_lora(model, tmp_path / "lora")
    updates = dense_updates(tmp_path / "lora")
    layers = pica_layers(model)
    assert set(updates) == set(layers)
    assert len(updates) == 12
    for path, layer in layers.items():
        wanted = layer.get_delta_weight("default").double()
        assert float((updates[path] - wanted).norm() / wanted.norm()) < layer_bound
    assert done.check is not None
    assert done.plan.exact
    assert done.plan.dtype == dtype
    assert done.check.dtype == torch.float32  # on a wider copy, where only the file's rounding shows
    assert done.check.effect > 10 * logit_bound * done.check.scale  # the adapter matters, so equality means something
    assert done.max_logit_difference is not None
    assert done.max_logit_difference < logit_bound * done.check.scale


def test_folder_holds_what_every_engine_reads(pica_llama, tmp_path: Path) -> None:
    export_lora(pica_llama(), tmp_path / "lora", base_model_name="org/model", revision="v1")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 12
    assert config["peft_type"] == "LORA"
    assert config["use_rslora"] is False
    assert config["use_dora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["init_lora_weights"] is True
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "v1")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.model.layers.{i}.{block}.lora_{factor}.weight"
        for i in range(3)
        for block in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
        for factor in "AB"
    }
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks what wrote it
    assert {p.name for p in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


def test_loads_where_pica_cannot_be_imported(pica_llama, tiny_llama, tokens, tmp_path: Path) -> None:
    model = pica_llama()
    export_lora(model, tmp_path / "lora", check=False)
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.save(tokens, tmp_path / "tokens.pt")
    script = """
import sys
class NoPica:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('pica', '_pica_entry'):
            raise ImportError('pica is not installed here')
sys.meta_path.insert(0, NoPica())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
try:
    import pica
except ImportError:
    pass
else:
    raise SystemExit('pica could be imported')
folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(folder + '/base')
model = PeftModel.from_pretrained(base, folder + '/lora')
with torch.no_grad():
    torch.save(model(input_ids=torch.load(folder + '/tokens.pt')).logits, folder + '/logits.pt')
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, timeout=120)
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
        with model.disable_adapter():
            without = model(input_ids=tokens).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-4, rtol=0)
    assert float((wanted - without).abs().max()) > 0.1


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncation_error_is_the_one_announced(pica_llama, tmp_path: Path, rank: int) -> None:
    model = pica_llama()
    announced = []
    done = export_lora(model, tmp_path / "lora", rank=rank, on_plan=announced.append)
    assert announced == [done.plan]
    assert not done.plan.exact
    rows = {row.group: row for row in done.plan.rows}
    updates = dense_updates(tmp_path / "lora")
    for path, layer in pica_layers(model).items():
        row = rows[layer.group_of["default"]]
        wanted = layer.get_delta_weight("default").double()
        measured = float((updates[path] - wanted).norm())
        assert row.error > 0
        assert measured == pytest.approx(row.error, rel=1e-3)
        assert row.relative == pytest.approx(measured / float(wanted.norm()), rel=1e-3)
        # no factorisation of this rank does better (Eckart and Young)
        tail = torch.linalg.svdvals(wanted)[rank:].norm()
        assert measured == pytest.approx(float(tail), rel=1e-3)


def test_energy_takes_the_smallest_rank_that_keeps_it(pica_llama, tmp_path: Path) -> None:
    model = pica_llama()
    done = export_lora(model, tmp_path / "lora", energy=0.9)
    assert 1 < done.plan.rank < 12
    assert all(row.relative**2 <= 0.1 for row in done.plan.rows)
    one_less = export_lora(model, tmp_path / "less", rank=done.plan.rank - 1, check=False)
    assert any(row.relative**2 > 0.1 for row in one_less.plan.rows)
    assert export_lora(model, tmp_path / "all", energy=1.0, check=False).plan.exact


def test_layers_with_fewer_directions_get_zero_columns(tiny_llama, tmp_path: Path) -> None:
    model = adapted(tiny_llama(), r=8, rank_pattern={"1.self_attn.q_proj": 3, "v_proj": 5})
    done = export_lora(model, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {8}
    short = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    assert short[3:].count_nonzero() == 0
    assert short[:3].count_nonzero() > 0
    assert {(row.rank, row.kept) for row in done.plan.rows} == {(3, 3), (5, 5), (8, 8)}
    truncated = export_lora(model, tmp_path / "small", rank=4)  # a layer's own columns are decomposed, not the group's
    assert {row.rank: row.error == 0.0 for row in truncated.plan.rows} == {3: True, 5: False, 8: False}


def test_saved_folder_and_model_give_the_same_files(pica_llama, tiny_llama, tmp_path: Path) -> None:
    model = pica_llama()
    export_lora(model, tmp_path / "from_model")
    model.save_pretrained(tmp_path / "adapter")
    base = tiny_llama()
    export_lora(tmp_path / "adapter", tmp_path / "from_folder", base)
    assert not any(isinstance(m, PicaLinear) for m in base.modules())  # the base model is left as it was
    base.save_pretrained(tmp_path / "base")
    export_lora(str(tmp_path / "adapter"), tmp_path / "from_name", str(tmp_path / "base"))
    wanted = load_file(tmp_path / "from_model" / "adapter_model.safetensors")
    for other in ("from_folder", "from_name"):
        found = load_file(tmp_path / other / "adapter_model.safetensors")
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5)


def test_a_model_with_encoder_and_decoder_is_checked_on_tokens_for_both(tmp_path: Path) -> None:
    model = get_peft_model(make("T5ForConditionalGeneration"), pica.PicaConfig(r=2, init_weights=False))
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(make("T5ForConditionalGeneration"), tmp_path / "lora").eval()
    batch = inputs_of("T5ForConditionalGeneration", model)
    with torch.no_grad():
        torch.testing.assert_close(lora(**batch).logits, model.eval()(**batch).logits, atol=1e-4, rtol=1e-4)


def test_adapter_in_a_transformers_model(pica_llama, tiny_llama, tokens, tmp_path: Path) -> None:
    """transformers' own integration keeps no PeftModel, and loads weights that are verified on first use."""
    trained = pica_llama()
    trained.save_pretrained(tmp_path / "adapter")
    model = tiny_llama()
    model.load_adapter(str(tmp_path / "adapter"))
    done = export_lora(model, tmp_path / "lora")
    assert done.layers == 12
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        wanted = trained(input_ids=tokens).logits
        torch.testing.assert_close(plain(input_ids=tokens).logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_model_is_left_as_it_was(pica_llama, tmp_path: Path, dtype: torch.dtype) -> None:
    model = pica_llama(dtype).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modules = {n: type(m) for n, m in model.named_modules()}
    state = torch.get_rng_state()
    export_lora(model, tmp_path / "lora", rank=4)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert {n: type(m) for n, m in model.named_modules()} == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert any(flags.values())
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert list(model.peft_config) == ["default"]


def test_named_adapter_of_several(pica_llama, tmp_path: Path) -> None:
    model = pica_llama()
    model.add_adapter("other", pica.PicaConfig(r=4, target_modules=["k_proj"], init_weights=False))
    done = export_lora(model, tmp_path / "lora", adapter_name="other")
    assert done.plan.target_modules == ("k_proj",)
    assert done.plan.rank == 4
    assert set(dense_updates(tmp_path / "lora")) == {f"model.layers.{i}.self_attn.k_proj" for i in range(3)}
    assert done.check is not None
    assert done.check.logits < 1e-4 < done.check.effect
    with pytest.raises(ConfigError, match="'third'"):
        export_lora(model, tmp_path / "no", adapter_name="third")


def test_an_adapter_that_is_switched_off_is_exported_as_it_is_on(pica_llama, tmp_path: Path) -> None:
    """The check switches it on in its own copy: otherwise it would refuse the export for an effect that is not there."""
    model = pica_llama()
    model.base_model.disable_adapter_layers()
    done = export_lora(model, tmp_path / "lora")
    assert done.check is not None
    assert done.check.logits < 1e-4 < done.check.effect


def test_modules_to_save_of_another_adapter_stay_out_of_the_check(pica_llama, tmp_path: Path) -> None:
    model = pica_llama()
    model.add_adapter("other", pica.PicaConfig(r=4, modules_to_save=["lm_head"], init_weights=False))
    model.set_adapter("other")
    model.get_base_model().get_submodule("lm_head.modules_to_save.other").weight.data.mul_(-3.0)
    done = export_lora(model, tmp_path / "lora", adapter_name="default")
    assert done.check is not None
    assert done.check.logits < 1e-4 < done.check.effect


def test_modules_to_save_travel_with_the_adapter(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
    )
    sizes.num_labels = 3
    model = adapted(LlamaForSequenceClassification(sizes).eval(), task_type="SEQ_CLS")
    assert model.peft_config["default"].modules_to_save  # pyright: ignore[reportAttributeAccessIssue]
    head = model.get_base_model().get_submodule("score.modules_to_save.default")
    assert isinstance(head, nn.Linear)
    head.weight.data.add_(1.0)
    done = export_lora(model, tmp_path / "lora", engine="vllm", dtype="float16")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in tensors
    assert done.check is not None
    assert done.check.logits < 0.01 * done.check.effect
    with pytest.raises(ExportError, match=r"score.*sglang"):
        export_lora(model, tmp_path / "no", engine="sglang")
    assert not (tmp_path / "no").exists()


def test_gpt2_and_an_encoder_export(tmp_path: Path) -> None:
    """Conv1D keeps its weight transposed; an encoder's `dense` is a name of adapted and of other layers."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    model = adapted(gpt2, r=6, target_modules=["c_attn"], scale=0.5)
    done = export_lora(model, tmp_path / "gpt2")
    assert done.check is not None
    assert done.check.logits < 1e-4 < done.check.effect
    assert json.loads((tmp_path / "gpt2" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    bert = BertModel(
        BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48),
    ).eval()
    model = adapted(bert, r=6, target_modules=["query", "attention.output.dense"], scale=0.5)
    done = export_lora(model, tmp_path / "bert")
    assert done.plan.target_modules == ("attention.output.dense", "query")
    assert done.check is not None
    assert done.check.logits < 1e-4 < done.check.effect


def test_check_refuses_a_wrong_folder(pica_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose B is a little off, or whose keys PEFT does not find, never reaches its place."""
    from pica.adapters.export import folder as lora_folder

    save = lora_folder.save_file

    def with_noise(tensors: dict[str, torch.Tensor], *args, **kwargs) -> None:
        save({k: v * 1.01 if "lora_B" in k else v for k, v in tensors.items()}, *args, **kwargs)

    monkeypatch.setattr(lora_folder, "save_file", with_noise)
    with pytest.raises(ExportError, match="differs from the adapter's by 0.01"):
        export_lora(pica_llama(), tmp_path / "lora")
    monkeypatch.setattr(lora_folder, "save_file", save)
    monkeypatch.setattr(lora_folder, "PREFIX", "base_model.")
    with pytest.raises(ExportError):
        export_lora(pica_llama(), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_check_needs_an_input_it_can_make(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    model = adapted(Net(), r=4, target_modules=["first", "second"])
    with pytest.raises(ExportError, match="check_inputs"):
        export_lora(model, tmp_path / "lora")
    done = export_lora(model, tmp_path / "lora", check_inputs={"x": torch.randn(3, 16)})
    assert done.check is not None
    assert done.check.logits < 1e-5 < done.check.effect


def test_existing_folders_are_safe(pica_llama, tmp_path: Path) -> None:
    model = pica_llama()
    target = tmp_path / "lora"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            export_lora(model, target, overwrite=overwrite)
    assert (target / "thesis.tex").read_text() == "years of work"
    (target / "thesis.tex").unlink()
    export_lora(model, target, check=False)  # empty now
    with pytest.raises(OutputError, match="not empty"):
        export_lora(model, target, check=False)
    export_lora(model, target, rank=2, check=False, overwrite=True)
    assert json.loads((target / "adapter_config.json").read_text())["r"] == 2
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        export_lora(model, tmp_path / "file", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "lora"]  # no temporary folders remain


def test_interrupted_overwrite_keeps_the_old_adapter(
    pica_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pica_llama()
    export_lora(model, tmp_path / "lora", rank=2, check=False)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lora_check, "output_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_lora(model, tmp_path / "lora", overwrite=True)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def test_wrong_arguments_are_one_sentence(pica_llama, tmp_path: Path) -> None:
    model = pica_llama()
    with pytest.raises(ConfigError, match="one of them"):
        export_lora(model, tmp_path / "x", rank=2, energy=0.5)
    with pytest.raises(RankError, match="rank=0"):
        export_lora(model, tmp_path / "x", rank=0)
    with pytest.raises(ConfigError, match="energy=1.5"):
        export_lora(model, tmp_path / "x", energy=1.5)
    with pytest.raises(ConfigError, match="dtype='int8'"):
        export_lora(model, tmp_path / "x", dtype="int8")
    with pytest.raises(ConfigError, match="engine='tgi2'"):
        export_lora(model, tmp_path / "x", engine="tgi2")
    with pytest.raises(AdapterFileError, match="does not exist"):
        export_lora(tmp_path / "nowhere", tmp_path / "x")
    model.merge_adapter()
    with pytest.raises(ExportError, match="unmerge"):
        export_lora(model, tmp_path / "x")
    model.unmerge_adapter()
    next(iter(pica_layers(model).values())).matrix("default").data[0, 0] = float("nan")
    with pytest.raises(AdapterFileError, match="NaN"):
        export_lora(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_are_refused(pica_llama, tmp_path: Path) -> None:
    model = pica_llama()
    next(iter(pica_layers(model).values())).matrix("default").data[0, 0] = 1e6
    with pytest.raises(AdapterFileError, match="float16"):
        export_lora(model, tmp_path / "x", dtype="float16")


def test_biases_token_embeddings_and_loras_are_refused(tiny_llama, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="biases"):
        export_lora(adapted(tiny_llama(attention_bias=True), bias="pica_only"), tmp_path / "x")
    with pytest.raises(ExportError, match="token embeddings"):
        export_lora(adapted(tiny_llama(), trainable_token_indices=[5]), tmp_path / "x")
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="it has none"):
        export_lora(lora, tmp_path / "x")
    lora.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(AdapterFileError, match="LORA"):
        export_lora(tmp_path / "lora", tmp_path / "x", tiny_llama())


def test_reloaded_lora_generates_what_pica_generates(pica_llama, tiny_llama, tokens, tmp_path: Path) -> None:
    model = pica_llama()
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora")).eval()
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(input_ids=tokens, **options)
    assert torch.equal(plain.generate(input_ids=tokens, **options), wanted)
    assert not torch.equal(tiny_llama().generate(input_ids=tokens, **options), wanted)  # pyright: ignore[reportArgumentType]
