"""Model Breadcrumbs: drop every task vector's largest and smallest entries (arXiv 2312.06795, section 3)."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.method import Method
from modelweld.methods.numerics.election import fused
from modelweld.methods.numerics.operands import Weights, coefficients_or_none, require_finite, stacked
from modelweld.methods.numerics.selection import kth_smallest


def merge(
    deltas: Tensor,
    *,
    density: float = 0.9,
    gamma: float = 0.01,
    combine: str = "linear",
    weights: Weights | None = None,
    diagnostics: MutableMapping[str, Any] | None = None,
) -> Tensor:
    """`(*shape)`: Σ c_i D_i of `(N, *shape)`, or TIES' election, over each model's entries between two thresholds.

    Of L entries the round(γ L) largest are dropped as outliers, and the smallest until round(density · L) remain;
    entries equal to a threshold stay. float32 (float64 for float64). Raises MergeError when density + gamma exceeds 1.
    `diagnostics` are those of `elect`; without an election `kept_share` alone.
    """
    deltas = stacked(deltas)
    require_finite(deltas)
    size = deltas[0].numel()
    if not (0 < density <= 1 and gamma >= 0 and density + gamma <= 1 + 1e-9) or combine not in ("linear", "ties"):
        raise MergeError(
            f"density {density}, gamma {gamma}, combine {combine!r}",
            hint="density + gamma may be at most 1; combine is linear or ties",
        )
    top = max(size - round(gamma * size), 1)  # the rank of the largest entry that stays; at least one does
    bottom = max(top - max(round(density * size), 1) + 1, 1)
    kept = torch.stack([_between(delta, bottom, top) for delta in deltas])
    c = coefficients_or_none(weights, deltas)
    return fused(kept, c, elected=combine == "ties", diagnostics=diagnostics)


def _between(delta: Tensor, bottom: int, top: int) -> Tensor:
    if delta.numel() == 0:
        return delta
    low = kth_smallest(delta, bottom, magnitudes=True)
    high = kth_smallest(delta, top, magnitudes=True)
    size = delta.abs()
    return delta * ((size >= low) & (size <= high))


METHOD = Method(
    config.Breadcrumbs,
    merge,
    summary="drop the largest and the smallest entries, then sum or TIES",
    source="2312.06795",
)
