"""A quantised model and its adapter as a plain model in full precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pica import PicaConfig
from pica.adapters.merge import merge_in_full
from pica.errors import QuantisationError
from tests.quantising import KINDS, load_quantised
from tests.shared import IDS


def adapted(folder: Any, kind: str) -> Any:
    base = load_quantised(folder, kind)
    torch.manual_seed(0)
    return get_peft_model(base, PicaConfig(r=8, init_weights=False, inference_mode=True)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_the_adapter_computed(tiny_llama, tmp_path, kind):
    """To float32's rounding where only weights are quantised: nothing is rounded a second time. Loads without pica."""
    tiny_llama(intermediate_size=128).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", kind)
    with torch.no_grad():
        wanted = model(IDS).logits
        plain: Any = merge_in_full(model).eval()
        plain.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        found = loaded.eval()(IDS).logits
    assert not hasattr(loaded.config, "quantization_config")
    assert {type(p) for p in plain.parameters()} == {torch.nn.Parameter}
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    rounds_its_input = kind in ("bnb int8", "torchao int8 dynamic")
    assert (found - wanted).norm() / wanted.norm() < (0.1 if rounds_its_input else 1e-5)


def test_only_an_unmerged_adapter_of_this_package(tiny_llama, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_llama(intermediate_size=128).save_pretrained(tmp_path)
    model = adapted(tmp_path, "bnb nf4")
    with pytest.warns(UserWarning, match="quantises"):
        model.merge_adapter()
    with pytest.raises(QuantisationError, match="that is not merged yet"):
        merge_in_full(model)
    assert isinstance(model, PeftModel)
