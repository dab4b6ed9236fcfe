"""Each engine's rules on real exports."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pica.adapters.export.engines import ENGINES, find_engine
from pica.adapters.export.gguf import pair_rows
from pica.adapters.export.lora import export_lora
from pica.adapters.export.names import incomplete_roles, plain_names
from pica.errors import ConfigError, ExportError, RankError

from ..conftest import adapted


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_ranks_are_rounded_up_to_legal_ones() -> None:
    vllm = ENGINES["vllm"]
    assert [vllm.legal_rank(r) for r in (1, 2, 8, 9, 65, 257, 320, 512)] == [1, 8, 8, 16, 128, 320, 320, 512]
    with pytest.raises(RankError, match="rank=512"):
        vllm.legal_rank(513)
    assert ENGINES["lorax"].legal_rank(3) == 8
    assert ENGINES["lorax"].legal_rank(33) == 48
    assert ENGINES["llama.cpp"].legal_rank(37) == 37
    assert find_engine(None) is None
    with pytest.raises(ConfigError, match="use one of vllm"):
        find_engine("tgi")


def test_commands_quote_what_a_shell_would_split() -> None:
    command = ENGINES["vllm"].command(base="org/m", folder="my dir/a", name="a", rank=64)
    assert command == "vllm serve org/m --enable-lora --max-lora-rank 64 --lora-modules a='my dir/a'"
    assert ENGINES["peft"].command(base="m", folder="it's", name="a", rank=1).endswith('(base_model, "it\'s")')


def test_vllm_gets_a_legal_rank_in_half_precision(pica_llama, tmp_path: Path) -> None:
    done = export_lora(pica_llama(), tmp_path / "lora", engine="vllm")
    assert done.plan.rank == 16
    assert done.plan.exact
    assert "--max-lora-rank 16" in done.command
    tensors = tensors_of(tmp_path / "lora")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    for key, tensor in tensors.items():
        padding = tensor[12:] if "lora_A" in key else tensor[:, 12:]
        assert padding.numel() > 0
        assert padding.count_nonzero() == 0
    with pytest.raises(ConfigError, match="float16 or bfloat16"):
        export_lora(pica_llama(), tmp_path / "full", engine="vllm", dtype="float32")


def test_truncation_uses_the_whole_legal_rank(pica_llama, tmp_path: Path) -> None:
    """Asked for 3 directions, vLLM's smallest fitting rank is 8: the five more cost nothing and are used."""
    done = export_lora(pica_llama(), tmp_path / "lora", rank=3, engine="vllm")
    assert {row.kept for row in done.plan.rows} == {8}
    smaller = export_lora(pica_llama(), tmp_path / "three", rank=3, check=False)
    assert all(a.error < b.error for a, b in zip(done.plan.rows, smaller.plan.rows))


def test_sglang_gets_complete_groups(pica_llama, tmp_path: Path) -> None:
    done = export_lora(pica_llama(), tmp_path / "lora", engine="sglang")
    assert {shape.path.rpartition(".")[2] for shape in done.plan.filled} == {"k_proj", "gate_proj"}
    tensors = tensors_of(tmp_path / "lora")
    for layer in range(3):
        key = f"base_model.model.model.layers.{layer}.self_attn.k_proj.lora_"
        assert tensors[key + "A.weight"].shape == (12, 64)
        assert tensors[key + "B.weight"].shape == (32, 12)
        assert tensors[key + "A.weight"].count_nonzero() == tensors[key + "B.weight"].count_nonzero() == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    plain = export_lora(pica_llama(), tmp_path / "plain", fill_siblings=True, dtype="bfloat16")
    assert plain.plan.filled == done.plan.filled


def test_layers_of_some_blocks_only(tiny_llama, tmp_path: Path) -> None:
    """PEFT gets long names, engines that want bare ones or every block get zero adapters in the other blocks."""
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2])
    done = export_lora(model, tmp_path / "peft")
    assert done.plan.target_modules == (
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
        "2.self_attn.q_proj",
        "2.self_attn.v_proj",
    )
    assert done.layers == 4
    for engine, names in (("lorax", ("q_proj", "v_proj")), ("sglang", ("k_proj", "q_proj", "v_proj"))):
        done = export_lora(model, tmp_path / engine, engine=engine)
        assert done.plan.target_modules == names
        assert done.layers == 3 * len(names)
        assert done.check is not None
        assert done.check.logits < 0.1 < done.check.effect


def test_lorax_refuses_what_it_would_drop(tiny_llama, tmp_path: Path) -> None:
    base = tiny_llama()
    del base.model.layers[1].self_attn.v_proj  # as in models whose values are their keys in some blocks
    base.model.layers[1].self_attn.v_proj = torch.nn.Identity()
    model = adapted(base, target_modules=[f"{i}.self_attn.v_proj" for i in (0, 2)])
    with pytest.raises(ExportError, match=r"1 of the model's blocks"):
        export_lora(model, tmp_path / "x", engine="lorax", check=False)
    head = adapted(tiny_llama(), target_modules=["q_proj", "lm_head"], r=4)
    with pytest.raises(ExportError, match="lm_head"):
        export_lora(
            adapted(tiny_llama(tie_word_embeddings=True), target_modules=["lm_head"], r=4),
            tmp_path / "y",
            engine="llama.cpp",
        )
    assert export_lora(head, tmp_path / "z", engine="lorax").plan.rank == 8


def test_lorax_warns_beyond_its_fast_rank(tiny_llama, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(tiny_llama(hidden_size=192, intermediate_size=192), r=140, target_modules=["q_proj"], scale=0.002)
    with caplog.at_level(logging.WARNING, logger="pica"):
        done = export_lora(model, tmp_path / "x", engine="lorax")
    assert done.plan.rank == 144
    assert "fast up to rank 128" in caplog.text


def test_plain_names_match_only_what_is_adapted() -> None:
    modules = [
        "e",
        "e.0",
        "e.0.attn.dense",
        "e.0.attn.dense.norm",
        "e.0.dense",
        "e.1.attn.dense",
        "e.1.dense",
        "pool.dense",
    ]
    assert plain_names(["e.0.attn.dense", "e.1.attn.dense"], modules) == ["attn.dense"]
    assert plain_names(["e.0.dense", "e.1.dense"], modules) == ["0.dense", "1.dense"]
    assert plain_names(["e.0.attn.dense"], modules) == ["0.attn.dense"]
    everything = [m for m in modules if m.endswith("dense")]
    assert plain_names(everything, modules) == ["dense"]


def test_incomplete_roles_counts_blocks_of_the_same_stack() -> None:
    modules = [f"{stack}.{i}.{name}" for stack, n in (("enc", 2), ("dec", 3)) for i in range(n) for name in ("q", "v")]
    assert incomplete_roles(["enc.0.q", "enc.1.q", "dec.0.q", "dec.1.q", "dec.2.q"], modules) == {}
    assert incomplete_roles(["dec.0.q", "dec.2.q", "dec.0.v"], modules) == {"dec.*.q": 1, "dec.*.v": 2}
    assert incomplete_roles(["head"], [*modules, "head"]) == {}


def test_gguf_adapter_has_llama_cpps_names_and_row_order(pica_llama, tmp_path: Path) -> None:
    export_lora(pica_llama(), tmp_path / "lora", engine="llama.cpp")
    lora = tensors_of(tmp_path / "lora")
    reader = gguf.GGUFReader(tmp_path / "lora" / "adapter.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 12.0
    found = {t.name: np.array(t.data) for t in reader.tensors}
    assert len(found) == 24
    down = "base_model.model.model.layers.2.mlp.down_proj.lora_"
    np.testing.assert_array_equal(found["blk.2.ffn_down.weight.lora_a"], lora[down + "A.weight"].numpy())
    np.testing.assert_array_equal(found["blk.2.ffn_down.weight.lora_b"], lora[down + "B.weight"].numpy())
    query = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    np.testing.assert_array_equal(found["blk.1.attn_q.weight.lora_a"], lora[query + "A.weight"].numpy())
    # 4 heads of 16: row 2i of a head is row i of its first half, row 2i + 1 row i of its second
    rows = lora[query + "B.weight"].numpy()
    order = [16 * head + i + 8 * half for head in range(4) for i in range(8) for half in range(2)]
    np.testing.assert_array_equal(found["blk.1.attn_q.weight.lora_b"], rows[order])


def test_pair_rows_turns_half_rotation_into_pair_rotation() -> None:
    """What the permutation is for: rotating pairs of permuted rows is rotating halves of the original ones."""
    rows, angle = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7, 1.1, 1.9])
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = rows[:4], rows[4:]
    halves = torch.cat([first * cos - second * sin, second * cos + first * sin])
    paired = pair_rows(rows, heads=1)
    even, odd = paired[0::2], paired[1::2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=1).reshape(8, 3)
    torch.testing.assert_close(pairs, pair_rows(halves, heads=1))


def test_gguf_of_an_unknown_architecture_names_the_script(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    with caplog.at_level(logging.WARNING, logger="pica"):
        export_lora(adapted(gpt2, r=4, target_modules=["c_attn"]), tmp_path / "lora", engine="llama.cpp")
    assert "convert_lora_to_gguf.py" in caplog.text
    assert not (tmp_path / "lora" / "adapter.gguf").exists()


def test_diffusers_loads_its_own_file(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    def unet() -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
        ).eval()

    model = adapted(unet(), r=6, target_modules=["to_q", "to_v"], scale=0.5)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
    }
    done = export_lora(model, tmp_path / "lora", engine="diffusers", check_inputs=inputs)
    assert done.command == f"pipeline.load_lora_weights({str(tmp_path / 'lora')!r})"
    plain = unet()
    with torch.no_grad():
        before = plain(**inputs).sample
        plain.load_lora_adapter(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors", prefix="unet")
        after = plain(**inputs).sample
        wanted = model(**inputs).sample
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=0)
    assert float((after - before).abs().max()) > 1e-3
