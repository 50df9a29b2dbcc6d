"""DARE: drop entries of the task vectors at random, rescale the rest (arXiv 2311.03099, section 3.2), then combine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.method import Method
from modelweld.methods.numerics import kernels
from modelweld.methods.numerics.election import elect_, weighted_sum
from modelweld.methods.numerics.kernels import Floats
from modelweld.methods.numerics.operands import Weights, coefficients_or_none, stacked
from modelweld.methods.numerics.rng import N_LEVELS, draws, stream_keys
from modelweld.methods.streaming import Kernel, KernelInputs


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
    level, factor = _dropping(drop_rate, rescale=rescale)
    c = coefficients_or_none(weights, deltas)
    flat = deltas.reshape(count, -1)  # (N, L)
    kept = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for row, delta, key in zip(kept, flat, keys, strict=True):
        chance = draws(key, offset, flat.shape[1], flat.device)
        torch.ge(chance, level, out=row).mul_(delta)
    merged = weighted_sum(kept, c) if combine == "linear" else elect_(kept, c)
    return merged.mul_(factor).reshape(deltas.shape[1:])


def _dropping(drop_rate: float, *, rescale: bool) -> tuple[int, float]:
    """The least draw that keeps an entry, and what the kept ones are multiplied by."""
    dropped = min(round(drop_rate * N_LEVELS), N_LEVELS - 1)
    return dropped - N_LEVELS // 2, N_LEVELS / (N_LEVELS - dropped) if rescale else 1.0


def _kernel(parameters: config.Dare, given: KernelInputs) -> Kernel:
    level, factor = _dropping(parameters.drop_rate, rescale=parameters.rescale)
    keys = stream_keys(parameters.seed, given.tensor, given.expert_digests)
    streams = np.array(keys, dtype=np.int64).view(np.uint64)
    c, elected = given.coefficients.numpy(), parameters.combine == "ties"

    def kernel(stack: Floats, origin: Floats, start: int, merged: Floats) -> None:
        kernels.drop(stack, origin, streams, start, level, c, elected, merged)
        merged *= merged.dtype.type(factor)

    return kernel


METHOD = Method(
    config.Dare,
    merge,
    summary="drop at random and rescale, then sum or TIES",
    source="2311.03099",
    shape="elementwise",
    host_kernel=_kernel,
)
