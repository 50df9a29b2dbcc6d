"""The plain mean of the experts' weights (model soups, arXiv 2203.05482, uniform soup)."""

from __future__ import annotations

from torch import Tensor

from modelweld.methods import linear


def merge(stack: Tensor) -> Tensor:
    """`(*shape)`: the mean over the models of `(N, *shape)`, in float32 (float64 for float64)."""
    return linear.merge(stack, normalize=True)
