"""The benchmarks run, on shapes that take seconds: what they measure is what they say, and the page takes their tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import basis, gpu, harness, many_adapters, methods, mixed_batches, models, packing, run, step_time
from pica.tuners.pica.layer import PicaLinear

TINY = LlamaConfig(
    vocab_size=1024,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    small = {
        "PiCa r=8": methods.CONFIGS["PiCa r=8"],
        "PiCa r=32": methods.CONFIGS["PiCa r=8"],
        "LoRA r=1": methods.CONFIGS["LoRA r=1"],
        "LoRA r=32": methods.CONFIGS["LoRA r=8"],
    }
    monkeypatch.setattr(methods, "CONFIGS", small)
    monkeypatch.setattr(many_adapters, "CONFIGS", small)


def tokens() -> torch.Tensor:
    return torch.arange(12).view(2, 6)


def test_the_reference_formulation_computes_what_pica_does():
    """The same update in the same layers, so that what is compared are two ways of computing one thing."""
    torch.manual_seed(0)
    pica_model = methods.adapt(models.load("tiny", torch.float64), "PiCa r=8")
    reference = methods.with_reference(models.load("tiny", torch.float64), 8, solve=True)
    assert methods.trainable(pica_model) == methods.trainable(reference)
    # its own matrices in the signs of pica's directions: both updates are M P summed over directions, sign for sign
    layers = {n: m for n, m in reference.named_modules() if isinstance(m, methods.ReferenceLinear)}
    for path, module in pica_model.named_modules():
        if not isinstance(module, PicaLinear):
            continue
        plain = layers[path.removeprefix("base_model.model.")]
        rows = module.method.directions("principal", module.frozen.read())
        signs = (rows * plain.get_buffer("rows")).sum(dim=1).sign()
        plain.get_buffer("rows").mul_(signs[:, None])
        matrix = module.matrix("default")
        if not bool(matrix.any()):
            torch.nn.init.normal_(matrix)
        plain.matrix.data = matrix.data
    torch.testing.assert_close(
        reference(tokens()).logits, pica_model(tokens()).logits, rtol=1e-3, atol=1e-4
    )  # its SVD is float32
    assert not torch.equal(reference(tokens()).logits, models.load("tiny", torch.float64)(tokens()).logits)


def test_every_contestant_passes_gradients_through_all_layers():
    for method in (methods.FLOOR, "PiCa r=8", "reference PiCa r=8", "LoRA r=1"):
        model = methods.adapt(models.load("tiny", torch.float32), method)
        seen = []
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.o_proj"))
        layer.register_full_backward_hook(lambda *_args, s=seen: s.append(1))
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert seen, method
        assert bool(methods.trainable(model)) == (method != methods.FLOOR)


def test_step_time_writes_ratios_to_the_floor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(step_time, "FEWEST", ["PiCa r=8", "LoRA r=1"])
    assert step_time.main(["--quick", "--model", "tiny", "--length", "6", "--batch", "2", "--name", "t"]) == 0
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["time_ratio"][methods.FLOOR]["ratio"] == 1
    assert found["trainable"] == {methods.FLOOR: 0, "PiCa r=8": 8 * (32 + 16 + 16 + 48 + 32), "LoRA r=1": 640}
    assert (tmp_path / "t.md").read_text().count("\n| ") == 4


def test_basis_and_many_adapters_write_their_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(basis, "BLOCKS", {"tiny": ([(32, 32), (48, 32), (32, 48)], 8, 2)})
    assert basis.main(["--quick", "--name", "b"]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["tiny"]["ratio"]["ratio"] > 0
    monkeypatch.setattr(many_adapters, "COUNTS", [1, 4])
    assert many_adapters.main(["--quick", "--model", "tiny", "--dtype", "float32", "--name", "m"]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert set(found["PiCa r=32"]["prefill"]) == {"1", "4"}
    capsys.readouterr()
    command = ["--loading-of", "PiCa r=32", "--model", "tiny", "--dtype", "float32", "--most", "4"]
    assert many_adapters.main(command) == 0  # as the whole benchmark calls itself
    assert set(json.loads(capsys.readouterr().out)) == set(found["PiCa r=32"]["loading"])


def test_mixed_batches_are_measured_beside_their_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(mixed_batches, "CASES", [(4, 4), (6, 2), (99, 99)])
    monkeypatch.setattr(mixed_batches, "PREFILL", [(4, 4)])
    monkeypatch.setattr(mixed_batches, "STREAM", 2**20)
    monkeypatch.setattr(mixed_batches, "RANK", 8)
    assert mixed_batches.main(["--quick", "--model", "tiny", "--dtype", "float32", "--name", "x"]) == 0
    found = json.loads((tmp_path / "x.json").read_text())["float32"]
    four, six = found["decode"]
    widths = 32 + 16 + 16 + 48 + 32
    assert four["bytes_read"] == 2 * 4 * 8 * widths * 4  # layers, adapters, rank, float32
    assert six["bytes_read"] == four["bytes_read"] / 2
    assert four["over_base"]["limit"]["ratio"] > 1
    assert [case["samples"] for case in found["prefill"]] == [4]
    assert (tmp_path / "x.md").read_text().count("\n| float32") == 2


def test_the_accelerator_benchmark_runs_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gpu, "METHODS", [methods.FLOOR, "PiCa r=8", "reference PiCa r=8", "no such method"])
    monkeypatch.setattr(gpu, "MIXED", [1, 3])
    monkeypatch.setattr(gpu, "LAST_START", 0.0)
    monkeypatch.setattr(gpu, "CALIBRATION", (2, 8))
    command = ["--models", "tiny", "--device", "cpu", "--batch", "2", "--length", "8", "--output", str(tmp_path)]
    with pytest.raises(KeyError):  # a mistake of ours is no result
        gpu.main([*command, "--seconds", "100"])
    monkeypatch.setattr(gpu, "METHODS", gpu.METHODS[:3])
    assert gpu.main([*command, "--seconds", "100"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["tiny"]
    assert found["left_out"] == {}
    assert found["activation basis"]["tokens"] == 16
    assert found["PiCa r=8"]["trainable"] == found["reference PiCa r=8"]["trainable"]
    assert gpu.main([*command, "--seconds", "0"]) == 0
    assert "no time left" in (tmp_path / "gpu.md").read_text()


def test_the_page_takes_each_table_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- results of one -->\nold\n<!-- end of one -->\nb\n<!-- results of two -->\n<!-- end of two -->\n"
    )
    (tmp_path / "one.md").write_text("new\n")
    monkeypatch.setattr(run, "PAGE", page)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    for _ in range(2):
        assert run.write_page() == ["two"]
        assert page.read_text().startswith("a\n<!-- results of one -->\nnew\n<!-- end of one -->\nb\n")


def test_packing_times_the_same_tokens_for_all(tmp_path: Path):
    assert packing.main(["--conversations", "6", "--length", "256", "--rounds", "1"]) == 0
    found = json.loads((tmp_path / "packing.json").read_text())
    assert list(found["ratios"]) == list(found["parameters"])
    assert len(found["ratios"]) == 6
    assert found["ratios"][packing.REFERENCE]["ratio"] == 1
    assert found["parameters"][packing.PICA] == found["parameters"][f"{packing.PICA}, packed"] == 22_528
    assert 0 < found["trained_tokens"] < found["tokens"] <= 6 * 256
    assert (tmp_path / "packing.md").read_text().count("\n| ") == 7
