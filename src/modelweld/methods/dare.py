"""DARE: drop entries of the task vectors at random, rescale the rest (arXiv 2311.03099, section 3.2), then combine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelweld.errors import MergeError
from modelweld.methods.numerics.election import elect_overwriting, weighted_sum
from modelweld.methods.numerics.operands import Weights, shares, stacked
from modelweld.methods.numerics.rng import LEVELS, draws, stream_keys


def merge(
    deltas: Tensor,
    *,
    drop_rate: float = 0.9,
    rescale: bool = True,
    combine: str = "linear",
    weights: Weights | None = None,
    keys: Sequence[int] | None = None,
    offset: int = 0,
) -> Tensor:
    """`(*shape)`: Σ c_i D_i m_i / (1 - p) over `(N, *shape)`, or TIES' election of the dropped and rescaled D_i.

    `keys` are the models' random streams (`rng.stream_keys`), `offset` is where a flat chunk begins in its tensor:
    a chunk gets the entries that the whole tensor would. float32 (float64 for float64). The rate is met to 1/65536 and
    the rescaling uses the rate that was met. Under `ties` entries that cancel exactly are 0.
    """
    deltas = stacked(deltas)
    count = deltas.shape[0]
    keys = stream_keys(0, "", [str(index) for index in range(count)]) if keys is None else keys
    if len(keys) != count:
        raise MergeError(f"{len(keys)} random streams for {count} models", hint="give each expert's digest")
    if not 0 <= drop_rate < 1 or combine not in ("linear", "ties"):
        raise MergeError(f"drop_rate {drop_rate}, combine {combine!r}", hint="a share below 1; linear or ties")
    level, factor = dropping(drop_rate, rescale=rescale)
    c = shares(weights, deltas)
    flat = deltas.reshape(count, -1)  # (N, L)
    kept = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for row, delta, key in zip(kept, flat, keys, strict=True):
        chance = draws(key, offset, flat.shape[1], flat.device)
        torch.ge(chance, level, out=row).mul_(delta)
    merged = weighted_sum(kept, c) if combine == "linear" else elect_overwriting(kept, c)
    return merged.mul_(factor).reshape(deltas.shape[1:])


def dropping(drop_rate: float, *, rescale: bool) -> tuple[int, float]:
    """The least draw that keeps an entry, and what the kept ones are multiplied by."""
    dropped = min(round(drop_rate * LEVELS), LEVELS - 1)
    return dropped - LEVELS // 2, LEVELS / (LEVELS - dropped) if rescale else 1.0
