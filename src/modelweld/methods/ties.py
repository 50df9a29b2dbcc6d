"""TIES: trim, elect sign, disjoint mean (arXiv 2306.01708, algorithm 1)."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from modelweld.methods.numerics.election import elect
from modelweld.methods.numerics.operands import Weights, require_finite, shares, stacked
from modelweld.methods.numerics.selection import magnitude_threshold


def merge(
    deltas: Tensor,
    *,
    density: float = 0.2,
    weights: Weights | None = None,
    thresholds: Tensor | None = None,
    disjoint_mean: bool = True,
    notes: MutableMapping[str, Any] | None = None,
) -> Tensor:
    """`(*shape)`: the elected, disjoint mean of `(N, *shape)` trimmed to `density`; float32 (float64 for float64).

    Each model is trimmed by its own threshold over this tensor, or by `thresholds` `(N,)` when they were taken over
    more than one tensor. Without `disjoint_mean` the sum is divided by N. Weights multiply after the election, so they
    scale a model's share without buying it votes. `notes` are those of `elect`.
    """
    deltas = stacked(deltas)
    if thresholds is None:
        require_finite(deltas)
        thresholds = trim_thresholds(deltas, density)
    c = shares(weights, deltas)
    return elect(deltas, c, thresholds=thresholds, disjoint_mean=disjoint_mean, notes=notes)


def trim_thresholds(deltas: Tensor, density: float) -> Tensor:
    """`(N,)`: the magnitude from which on each model's entries belong to its largest `density`."""
    return torch.stack([magnitude_threshold(delta, density) for delta in deltas])
