"""The update y + h M^T by each of its ways, and how the result lies in memory."""

from __future__ import annotations

import pytest
import torch

from pica.basis.apply import add_product, coordinates

LAYOUTS = ["rows", "columns", "strided", "one token"]


def laid_out(layout: str, *shape: int) -> torch.Tensor:
    """(batch, tokens, width): tokens side by side, or one beside the other as a convolution's output has them."""
    g = torch.Generator().manual_seed(sum(shape))
    batch, tokens, width = shape
    if layout == "columns":
        return torch.randn(batch, width, tokens, generator=g, dtype=torch.float64).mT
    if layout == "strided":
        return torch.randn(batch, tokens, 2 * width, generator=g, dtype=torch.float64)[..., ::2]
    made = torch.randn(*shape, generator=g, dtype=torch.float64)
    return made[0, 0] if layout == "one token" else made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_update_is_the_formula_and_lies_as_the_output_does(layout, in_place, grad):
    y, h = laid_out(layout, 2, 5, 6), laid_out(layout, 2, 5, 3)
    matrix = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=grad)
    expected = y + h @ matrix.detach().T
    found = add_product(y.clone(), h, matrix, in_place=in_place)
    torch.testing.assert_close(found.detach(), expected)
    assert found.stride() == y.clone().stride()
    if grad:
        found.square().sum().backward()
        wanted = 2 * expected.reshape(-1, 6).T @ h.reshape(-1, 3)
        torch.testing.assert_close(matrix.grad, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shifted", [False, True])
def test_coordinates_are_the_formula(layout, shifted):
    x = laid_out(layout, 2, 5, 6)
    projector = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.arange(3.0, dtype=torch.float64) if shifted else None
    expected = x @ projector.T - (0 if shift is None else shift)
    torch.testing.assert_close(coordinates(x, projector, shift), expected)
    in_half = coordinates(x.bfloat16(), projector, shift)
    assert in_half.dtype == torch.bfloat16
    torch.testing.assert_close(in_half.double(), expected, atol=0.1, rtol=0.05)
