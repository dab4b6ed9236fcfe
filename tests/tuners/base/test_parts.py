"""What a layer is composed of belongs to that layer, also to a copy that torch makes of it."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from pica import PicaConfig, SvftConfig
from pica.tuners.base.layer import SharedLayer

METHODS = [PicaConfig(r=4, init_weights=False), SvftConfig(init_weights=False)]


def replica_of(model: nn.Module) -> nn.Module:
    """What `nn.parallel.replicate` makes of a model for another device, here on the same one."""
    modules = list(model.modules())
    replicas = [module._replicate_for_data_parallel() for module in modules]
    replica_of = dict(zip(modules, replicas))
    for module, replica in replica_of.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replica_of[child]
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, kind).items():
                if tensor is None:
                    getattr(replica, kind)[name] = None
                else:
                    setattr(replica, name, tensor.detach().clone())
    return cast(nn.Module, replicas[0])


@pytest.mark.parametrize("config", METHODS, ids=["pica", "svft"])
def test_a_replica_reads_the_tensors_of_its_own_device(tiny_llama, config: PeftConfig):
    model = get_peft_model(tiny_llama(), copy.deepcopy(config)).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
        assert not torch.allclose(expected, plain)
        replica: Any = replica_of(model)
        assert torch.equal(replica(ids).logits, expected)
        for layer in (m for m in replica.modules() if isinstance(m, SharedLayer)):
            assert layer.frozen.read().data_ptr() == cast(Any, layer.base_layer).weight.data_ptr()
            for key in layer.bases.requests:
                rows = layer.bases.rows(key)
                assert rows is not None
                rows.zero_()
        assert torch.equal(replica(ids).logits, plain)
        assert torch.equal(model(ids).logits, expected)
