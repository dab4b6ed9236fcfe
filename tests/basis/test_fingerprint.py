from __future__ import annotations

import numpy as np
import pytest
import torch

from pica.basis import solve_basis
from pica.basis.alignment import align
from pica.basis.fingerprint import (
    HEADER,
    LIMIT_BYTES,
    Mode,
    choose_mode,
    decode,
    encode,
    path_hash,
    probe_vectors,
    take_print,
)
from pica.errors import AdapterFileError


def weight(out: int, inn: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    n = min(out, inn)
    left, _ = torch.linalg.qr(torch.randn(out, n, generator=g, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(inn, n, generator=g, dtype=torch.float64))
    return ((left * torch.logspace(0, -1, n)) @ right.T).float()


def printed(w: torch.Tensor, rank: int, mode: Mode, probes: int):
    basis = solve_basis(w, rank)
    return basis, take_print(
        basis.projector,
        w,
        basis.side,
        rank=rank,
        projection="principal",
        solver=basis.solver,
        mode=mode,
        probes=probes,
    )


MODES: list[tuple[Mode, int]] = [("narrow", 1), ("wide", 4), ("wide", 8)]


def test_probes_are_these_numbers_in_every_implementation():
    """SplitMix64 of 0, 1, 2, ... and of 2^32, 2^32 + 1, ...: the specification in docs/adapter-format.md."""
    probes = probe_vectors(16, 2)
    assert ["".join("+" if v > 0 else "-" for v in row) for row in probes] == PROBES
    many = probe_vectors(4096, 16)
    assert abs(many.mean()) < 0.02
    assert np.abs(many @ many.T / 4096 - np.eye(16)).max() < 0.08


def splitmix64(counter: int) -> int:
    """The published generator, once more in plain integers."""
    z = (counter + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


PROBES = ["".join("-" if splitmix64(2**32 * j + k) >> 63 else "+" for k in range(16)) for j in range(2)]


def test_splitmix64_is_the_published_one():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # first output for seed 0


@pytest.mark.parametrize(("mode", "probes"), MODES)
@pytest.mark.parametrize("rank", [1, 2, 7, 16])
def test_bytes_round_trip(mode, probes, rank):
    prints = {f"layers.{i}.fc": printed(weight(24, 20, i), rank, mode, probes)[1] for i in range(3)}
    data = encode(prints, mode, probes)
    decoded, mode_back, probes_back = decode(data)
    assert (mode_back, probes_back) == (mode, probes)
    for path, before in prints.items():
        after = decoded[path_hash(path)]
        assert (after.out_features, after.in_features, after.rank, after.usable) == (24, 20, rank, rank)
        assert (after.dtype, after.solver, after.projection) == ("float32", before.solver, "principal")
        np.testing.assert_allclose(after.values, before.values, atol=1e-12)
        np.testing.assert_array_equal(after.choice, before.choice)
        np.testing.assert_allclose(after.samples, before.samples, atol=1e-3)
    assert encode({p: decoded[path_hash(p)] for p in prints}, mode, probes) == data


@pytest.mark.parametrize(("mode", "probes"), MODES)
@pytest.mark.parametrize("shape", [(24, 24), (40, 20), (20, 40)], ids=["square", "tall", "wide"])
def test_the_same_basis_aligns_and_another_does_not(mode, probes, shape):
    w = weight(*shape)
    basis, trained = printed(w, 12, mode, probes)
    same = align(trained, mode, basis.projector, w, basis.side, lambda: basis.gains)
    assert same.rotation is None
    assert same.deviation < 1e-2
    assert same.gain_error < 1e-3
    other = weight(*shape, seed=5)
    strange = solve_basis(other, 12)
    assert align(trained, mode, strange.projector, other, strange.side, lambda: strange.gains).deviation > 0.3


@pytest.mark.parametrize(("mode", "probes"), MODES)
def test_flipped_signs_are_found(mode, probes):
    w = weight(40, 30)
    basis, trained = printed(w, 16, mode, probes)
    signs = torch.where(torch.rand(16, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    found = align(trained, mode, basis.projector * signs[:, None], w, "in", lambda: basis.gains)
    assert found.rotation is not None
    assert torch.equal(found.rotation.float(), torch.diag(signs))
    assert found.deviation < 1e-2


def test_the_deviation_is_the_one_that_was_made():
    w = weight(300, 256)
    basis, trained = printed(w, 128, "wide", 8)
    g = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 0.5):
        noise = torch.randn(basis.projector.shape, generator=g)
        moved = basis.projector + size * noise / noise.norm(dim=1, keepdim=True)
        assert align(trained, "wide", moved, w, "in", lambda: basis.gains).deviation == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize(("mode", "probes"), MODES)
@pytest.mark.parametrize("damage", ["cut", "longer", "magic", "version", "empty", "count"])
def test_damage_is_noticed(mode, probes, damage):
    data = encode({"a": printed(weight(8, 8), 4, mode, probes)[1]}, mode, probes)
    broken = {
        "cut": data[:-3],
        "longer": data + b"\0",
        "magic": b"ACIP" + data[4:],
        "version": data[:4] + b"\x09" + data[5:],
        "empty": b"",
        "count": data[:8] + b"\xff\xff\xff\xff" + data[12:],
    }[damage]
    with pytest.raises(AdapterFileError, match="fingerprint"):
        decode(broken)


@pytest.mark.parametrize(
    ("layers", "rank", "elements"),
    [(150, 256, 786_432), (150, 32, 98_304), (90, 256, 5_373_952), (224, 256, 11_010_048), (2, 8, 100)],
    ids=["SmolLM2 r=256", "SmolLM2 r=32", "Gemma-2B", "Llama-3-8B", "tiny"],
)
def test_a_fingerprint_is_small_beside_the_matrices(layers, rank, elements):
    mode, probes = choose_mode([rank] * layers, elements)
    per_layer = 36 + (rank * probes * 2 if mode == "wide" else (rank + rank % 2) // 2 * 3)
    assert HEADER.size + layers * per_layer <= max(LIMIT_BYTES, 0.02 * 4 * elements)


@pytest.mark.parametrize("least", [1e-3, 1e-7])
@pytest.mark.parametrize(("mode", "probes"), MODES)
def test_minor_directions_of_an_unchanged_weight_are_found_unchanged(least: float, mode: Mode, probes: int):
    """Their first gain is the least one, and the others are many times it, more than float16 holds exactly or at all."""
    g = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(64, 48, generator=g, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(48, 48, generator=g, dtype=torch.float64))
    w = left @ torch.diag(torch.logspace(0, np.log10(least), 48, dtype=torch.float64)) @ right.T
    basis = solve_basis(w, 40, projection="minor")
    names = {"rank": 40, "projection": "minor", "solver": basis.solver, "mode": mode, "probes": probes}
    print_ = take_print(basis.projector, w, basis.side, **names)
    read, _, _ = decode(encode({"layer": print_}, mode, probes))
    (trained,) = read.values()
    found = align(trained, mode, basis.projector, w, basis.side, lambda: torch.zeros(40))
    assert found.gain_error < 1e-3
    changed = align(trained, mode, basis.projector, w * 1.2, basis.side, lambda: torch.zeros(40))
    assert changed.gain_error > 0.1


@pytest.mark.parametrize(
    ("rank", "elements", "expected"),
    [  # docs/adapter-format.md: 12 bytes of header, 36 a layer, and the rest of 64 KB or 2% for the directions
        (4093, 0, ("wide", 8)),
        (4094, 0, ("wide", 4)),
        (8186, 0, ("wide", 4)),
        (8187, 0, ("narrow", 1)),
        (9997, 2_000_000, ("wide", 8)),
        (9998, 2_000_000, ("wide", 4)),
    ],
)
def test_the_mode_follows_from_the_room_as_the_format_says(rank, elements, expected):
    assert choose_mode([rank], elements) == expected


def test_narrow_keeps_the_strongest_of_sixteen_probes():
    """As docs/adapter-format.md has it: whoever reads the file elsewhere looks for no seventeenth."""
    w = weight(220, 200)
    basis, trained = printed(w, 200, "narrow", 1)
    seen = basis.projector.double().numpy() @ probe_vectors(200, 16).T
    assert (trained.choice[:, 0] == np.abs(seen).argmax(axis=1)).all()
    strongest = np.take_along_axis(seen, trained.choice, axis=1)
    assert np.abs(trained.values - strongest).max() <= 0.02 + 1e-6
    assert {*trained.choice[:, 0]} == {*range(16)}


@pytest.mark.parametrize("first", [0, 5, 13])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rotation_among_equal_gains_is_found_wherever_they_are(first: int, size: int):
    g = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(24, 24, generator=g, dtype=torch.float64))[0] for _ in range(2))
    values = torch.linspace(3, 1, 24, dtype=torch.float64)
    values[first : first + size] = values[first]
    w = left @ torch.diag(values) @ right.T
    basis, trained = printed(w, 18, "wide", 4)
    turn = torch.eye(18, dtype=torch.float64)
    turn[first : first + size, first : first + size] = torch.linalg.qr(
        torch.randn(size, size, generator=g, dtype=torch.float64)
    )[0]
    found = align(trained, "wide", turn @ basis.projector, w, basis.side, lambda: basis.gains)
    assert found.rotation is not None
    torch.testing.assert_close(found.rotation, turn.T, atol=2e-3, rtol=0)
    assert found.deviation < 1e-3
    apart = values + torch.linspace(0, 0.2, 24, dtype=torch.float64)  # the same turn of other gains is another basis
    assert align(trained, "wide", turn @ basis.projector, w, basis.side, lambda: apart[:18]).worst > 0.1
