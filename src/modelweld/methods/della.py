"""DELLA: drop entries at random, the smaller the likelier, rescale, elect and fuse (arXiv 2406.11617, section 3)."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.method import Method
from modelweld.methods.numerics.election import fused
from modelweld.methods.numerics.operands import Weights, coefficients_or_none, stacked
from modelweld.methods.numerics.rng import N_LEVELS, draws, stream_keys


def merge(
    deltas: Tensor,
    *,
    drop_rate: float = 0.7,
    epsilon: float = 0.2,
    rescale: bool = True,
    combine: str = "ties",
    weights: Weights | None = None,
    keys: Sequence[int] | None = None,
    diagnostics: MutableMapping[str, Any] | None = None,
) -> Tensor:
    """`(*shape)`: TIES' election (or Σ c_i) over `(N, *shape)` after MagPrune; float32 (float64 for float64).

    In a row of n entries the one of rank r (0 for the largest magnitude) is dropped with probability
    p_r = p - ε/2 + ε r / n and, kept, divided by 1 - p_r. The ranks are the definition: rows are sorted, tensors of
    one dimension are one row. `keys` are the models' random streams. Raises MergeError when p ± ε/2 leaves [0, 1).
    `diagnostics` are those of `elect`; without an election `kept_share` alone.
    """
    deltas = stacked(deltas)
    keys = stream_keys(0, "", [str(index) for index in range(deltas.shape[0])]) if keys is None else keys
    if len(keys) != deltas.shape[0]:
        raise MergeError(f"{len(keys)} random streams for {deltas.shape[0]} models", hint="give each expert's digest")
    if not (drop_rate - epsilon / 2 >= 0 and drop_rate + epsilon / 2 < 1) or combine not in ("linear", "ties"):
        raise MergeError(
            f"drop_rate {drop_rate}, epsilon {epsilon}, combine {combine!r}",
            hint="drop_rate ± epsilon / 2 must stay within [0, 1); combine is linear or ties",
        )
    first = drop_rate - epsilon / 2
    kept = torch.stack(
        [_magprune(delta, first, epsilon, rescale, key) for delta, key in zip(deltas, keys, strict=True)]
    )
    c = coefficients_or_none(weights, deltas)
    return fused(kept, c, elected=combine == "ties", diagnostics=diagnostics)


def _magprune(delta: Tensor, first: float, epsilon: float, rescale: bool, key: int) -> Tensor:
    if delta.numel() == 0:
        return delta
    rows = delta.reshape(-1, delta.shape[-1]) if delta.ndim else delta.reshape(1, 1)
    order = rows.abs().argsort(dim=1, descending=True, stable=True)
    places = torch.arange(rows.shape[1], device=rows.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    dropped = ranks.to(rows.dtype) * (epsilon / rows.shape[1]) + first
    chance = draws(key, 0, rows.numel(), rows.device).view_as(rows)
    kept = rows * (chance >= dropped * N_LEVELS - N_LEVELS // 2)
    return (kept / (1 - dropped) if rescale else kept).view_as(delta)


METHOD = Method(
    config.Della,
    merge,
    summary="drop at random, small entries likelier, then TIES or the sum",
    source="2406.11617",
)
