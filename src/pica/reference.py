"""The method as one reads it in the paper (arXiv 2505.20211): for people, and for tests to hold the package against.

Full decompositions, dense updates, no PEFT, nothing fast. Weights are as PyTorch keeps them, W (out, in), so the paper's
W0 is W^T, its column space U_r is spanned by the top right singular vectors of W, and its B is M^T.
"""

from __future__ import annotations

from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs

import torch
from torch import Tensor


def column_space(weight: Float[Tensor, "out in"], r: int) -> Float[Tensor, "r in"]:
    """P, the paper's U_r^T: (r, in), the top right singular vectors of `weight` (out, in), each with its sign chosen."""
    # A singular vector is determined up to its sign. Here, as in the package, the entry of largest size is positive.
    rows = torch.linalg.svd(weight, full_matrices=False).Vh[:r]
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign()


def adapted(weights: list[Float[Tensor, "out in"]], matrix: Float[Tensor, "out r"]) -> list[Float[Tensor, "out in"]]:
    """W_i + M P_i for the layers of one role, which share `matrix` M (out, r) (the paper's section 3.2)."""
    return [w + matrix @ column_space(w, matrix.shape[1]) for w in weights]


class Algorithm1:
    """Adam on full weights, each step projected onto their column spaces (the paper's Algorithm 1), for one role.

    It equals Adam on the shared matrix M of `adapted`, step for step.

    Attributes:
        weights: (out, in) each; `step` changes them in place.
        spaces: P_i (r, in) of each weight, of before the first step.
    """

    def __init__(
        self,
        weights: list[Tensor],
        r: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Start with the weights as they were pre-trained; `lr`, `betas` and `eps` are Adam's."""
        self.weights = weights
        self.spaces = [column_space(w, r) for w in weights]
        self.lr, self.betas, self.eps = lr, betas, eps
        self.steps = 0
        self.first = self.second = torch.zeros_like(weights[0][:, :1].expand(-1, r))  # one pair of moments for the role

    def step(self, gradients: list[Tensor]) -> None:
        """One step, given the loss's gradient (out, in) with respect to each weight."""
        projected = sum(
            (g @ p.T for g, p in zip(gradients, self.spaces)), torch.zeros_like(self.first)
        )  # R = sum G P^T
        self.steps += 1
        one, two = self.betas
        self.first = one * self.first + (1 - one) * projected
        self.second = two * self.second + (1 - two) * projected**2
        mean, square = self.first / (1 - one**self.steps), self.second / (1 - two**self.steps)
        change = mean / (square.sqrt() + self.eps)  # N (out, r)
        for weight, space in zip(self.weights, self.spaces):
            weight -= self.lr * change @ space
