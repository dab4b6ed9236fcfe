"""The shapes in the annotations of the pure functions are those of what runs, and a wrong one is told from a right one.

For a type checker `Float[Tensor, "out in"]` is a Tensor. Here it means what it means in jaxtyping, and beartype checks it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import jaxtyping
import pytest
import torch
from beartype import beartype
from torch import Tensor

import pica.basis
import pica.theory
from pica import reference
from pica.basis import _lapack, _proof, _rounding, apply, decomposition, file, moments, orient, spectral
from pica.theory import bounds, diagnostics, projection, sequential, subspaces

OUT, IN, R = 6, 5, 3


def make(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def rows(count: int, width: int) -> Tensor:
    return subspaces.random_directions(count, width, seed=count)


W, P, M, Q = make(OUT, IN), rows(R, IN), make(OUT, R), rows(IN, IN)
BASIS = spectral.solve_basis(W, R, side="in")
SPECTRUM = subspaces.spectrum(W)
GRAM = W.T @ W
TALLER = make(OUT + 1, IN)

# function: arguments that fit together, and the same with one that does not
CASES: dict[Callable[..., Any], tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    apply.coordinates: ((make(2, 4, IN), P, make(R)), (make(2, 4, IN), P, make(R + 1))),
    apply.add_product: ((make(2, 4, OUT), make(2, 4, R), M), (make(2, 4, OUT), make(2, 4, R), M.T)),
    apply.delta_weight: ((M, P), (M, P.T)),
    orient.direction_signs: ((P,), (P[0],)),
    decomposition.factorise: ((W,), (W[0],)),
    file.weight_sample: ((W,), (W[0],)),
    moments.oriented: ((P,), (P[0],)),
    moments.rows_of_outputs: ((rows(2, OUT), W), (rows(2, OUT), TALLER)),
    spectral.solve_basis: ((W, R), (W[None], R)),
    spectral.Basis.directions: ((BASIS, W), (BASIS, W[0])),
    _rounding.clear_count: ((W.bfloat16(), BASIS.gains), (W.bfloat16(), BASIS.gains[None])),
    _rounding.norms: ((W,), (W[0],)),
    _rounding.readable: ((W, 1.0, BASIS.gains), (W, 1.0, BASIS.gains[None])),
    _lapack.add_lower_gram: ((GRAM.clone(), W), (GRAM.clone(), W.T)),
    _lapack.eigenvectors: ((GRAM.clone(), 1, 3), (W.clone(), 1, 3)),
    _proof.flaw: (
        (W, BASIS.projector, BASIS.gains, "in", "principal"),
        (W, BASIS.projector, BASIS.gains[:-1], "in", "principal"),
    ),
    subspaces.as_matrix: ((W,), (W[0],)),
    subspaces.check_orthonormal: ((P, "rows"), (P[0], "rows")),
    subspaces.spectra_of: ((SPECTRUM, W), (W, TALLER)),
    subspaces.spectrum: ((W,), (W[0],)),
    subspaces.sines: ((P, rows(2, IN)), (P, rows(2, IN + 1))),
    subspaces.principal_angles: ((P, rows(2, IN)), (P, rows(2, IN + 1))),
    bounds.wedin: ((W, SPECTRUM, W, R), (W, SPECTRUM, W.T, R)),
    bounds.weyl: ((W, 2 * W), (W, TALLER)),
    bounds.mirsky: ((W, 2 * W), (W, TALLER)),
    bounds.norm_invariance: ((W, Q), (W, P)),
    bounds.non_expansiveness: ((W, P), (W.T, P)),
    diagnostics.direction_energies: ((W, P), (W.T, P)),
    diagnostics.captured_energy: ((W, P), (W.T, P)),
    diagnostics.rank_for_share: ((make(R).square(), 0.5), (P, 0.5)),
    diagnostics.intruder_dimensions: ((Q, P), (Q, rows(R, IN + 1))),
    diagnostics.effective_rank: ((make(R).square(),), (P,)),
    diagnostics.stable_rank: ((make(R).square(),), (P,)),
    diagnostics.spectrum_rank: ((W, 0.5), (W[0], 0.5)),
    projection.perturbations: ((SPECTRUM, 2 * W), (W, TALLER)),
    projection.first_order_perturbations: ((W, W), (W, TALLER)),
    projection.projection_error: ((W, 2 * W, W, R), (W, 2 * W, W.T, R)),
    reference.column_space: ((W, R), (W[0], R)),
    reference.adapted: (([W, W], M), ([W, W], M[:-1])),
}
KEYWORDS = {
    subspaces.random_directions: ((R, IN), {"seed": 0}),
    sequential.sequential_projection: ((lambda w: (w - 1).square().sum(), W, P), {"step_size": 0.1, "steps": 2}),
}


def name_of(case: Any) -> str:
    return f"{case.__module__.rpartition('.')[2]}.{case.__qualname__}"


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a function that checks the shapes of what it gets and of what it returns."""

    def check(function: Callable[..., Any]) -> Callable[..., Any]:
        for module in (sys.modules[name] for name in list(sys.modules) if name.startswith("pica.")):
            for kind in ("Float", "Int"):
                if getattr(module, kind, None) is typing.Annotated:
                    monkeypatch.setattr(module, kind, getattr(jaxtyping, kind))
        return jaxtyping.jaxtyped(typechecker=beartype)(function)

    return check


def assert_fields_fit(value: Any) -> None:
    if isinstance(value, (list, tuple)):
        for each in value:
            assert_fields_fit(each)
    if not is_dataclass(value):
        return
    hints = typing.get_type_hints(type(value))
    with jaxtyping.jaxtyped("context"):  # a dimension's name means one number in all fields
        for field in fields(value):
            if isinstance(hints[field.name], type) and issubclass(hints[field.name], jaxtyping.AbstractArray):
                assert isinstance(getattr(value, field.name), hints[field.name]), field.name


@pytest.mark.parametrize("function", CASES, ids=name_of)
def test_what_runs_has_the_shapes_of_the_annotations(function: Callable[..., Any], checked: Any):
    right, wrong = CASES[function]
    assert_fields_fit(checked(function)(*right))
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(function)(*wrong)


@pytest.mark.parametrize("function", KEYWORDS, ids=name_of)
def test_so_it_has_with_arguments_by_name(function: Callable[..., Any], checked: Any):
    arguments, named = KEYWORDS[function]
    assert_fields_fit(checked(function)(*arguments, **named))


def test_a_result_whose_fields_do_not_fit_together_is_told(checked: Any):
    checked(subspaces.spectrum)
    assert_fields_fit(SPECTRUM)
    with pytest.raises(AssertionError, match="inputs"):
        assert_fields_fit(subspaces.Spectrum(SPECTRUM.outputs, SPECTRUM.values, SPECTRUM.inputs[1:]))


def test_every_annotated_function_is_checked():
    modules = [reference]
    for package in (pica.basis, pica.theory):
        names = [f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
        modules += map(importlib.import_module, names)
    found = set()
    for module in modules:
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        for kind in [value for value in own if inspect.isclass(value)]:
            own += [
                member for name, member in vars(kind).items() if name != "__init__"
            ]  # a dataclass's: see its fields
        functions = [getattr(value, "__wrapped__", value) for value in own]
        found |= {f for f in functions if inspect.isfunction(f) and "Float[" in str(f.__annotations__)}
    assert found == CASES.keys() | KEYWORDS.keys()
