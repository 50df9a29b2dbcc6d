"""Exact selection in O(n): the k-th smallest, without sorting and, on an accelerator, without waiting for it.

On the CPU a sample brackets the answer, one pass counts what lies below and collects the few in between, and only those
are partitioned. Elsewhere the bits of a float order like an integer, so bisecting them takes one counting pass a bit
and no host round trip.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelweld.methods.numerics import kernels

_SMALL = 1 << 17  # below this a plain partition is faster than bracketing
_SAMPLE = 1 << 16  # at most
_TIE = 1e-11  # relative distance within which magnitudes are equal: far above rounding, far below any real gap


def magnitude_threshold(values: Tensor, keep_share: float) -> Tensor:
    """The 0-d threshold t such that `|values| >= t` keeps the largest `keep_share` of the entries.

    With L entries, t is the k-th smallest magnitude, k = L - round(L * keep_share), rounding half to even; so one entry
    more than round(L * keep_share), and ties, are kept. This is the convention of the TIES and DRM papers' code. k = 0
    keeps all (t = 0).
    """
    count = values.numel()
    rank = count - round(count * keep_share)
    if rank <= 0:
        return torch.zeros((), dtype=values.dtype, device=values.device)
    return kth_smallest(values, rank, magnitudes=True)


def pruned(values: Tensor, limit: Tensor, out: Tensor | None = None) -> Tensor:
    """A copy of the values (in `out`) with those of a magnitude below `limit` (which broadcasts) zeroed."""
    if limit.ndim == 0 and limit.device.type == "cpu":
        # One pass instead of three; it zeroes what is at most its bound, so the bound is the next number down.
        below = float(torch.nextafter(limit, torch.zeros_like(limit)))
        out = torch.empty_like(values) if out is None else out
        torch.ops.aten.hardshrink.out(values, below, out=out)
        return out
    # The mask stays a float: producing and multiplying bool masks takes a CPU several times as long.
    mask = torch.abs(values, out=out)
    return torch.ge(mask, limit, out=mask).mul_(values)


def nonzeros(values: Tensor) -> Tensor:
    """How many entries are not zero, 0-d."""
    if values.device.type == "cpu":
        return torch.tensor(np.count_nonzero(values.numpy() != 0))  # a tenth of the time of torch's
    return torch.count_nonzero(values)


def quota_threshold(values: Tensor, quota: Tensor, keep_share: float) -> Tensor:
    """As `magnitude_threshold`, when only `quota` (0-d) entries count and all the others are zero.

    For singular vectors, in float64: a hair below the k-th smallest magnitude, since equal or rank-1 models, and
    orthogonal matrices, tie at the threshold in exact arithmetic and rounding must not choose among them.
    """
    # In float64 on the device this rounds as Python does, half to even, without waiting for the quota.
    keep = (quota.double() * keep_share).round().long()
    if values.device.type == "cpu" and int(keep) == int(quota):
        return torch.zeros((), dtype=values.dtype)
    # The zeros come first in the order and shift k by their number.
    return kth_smallest(values, values.numel() - keep, magnitudes=True) * (1 - _TIE)


def kth_smallest(values: Tensor, k: int | Tensor, *, magnitudes: bool = False) -> Tensor:
    """The k-th smallest of the values (or of their magnitudes), a 0-d tensor, exactly; 1 <= k <= numel.

    Off the CPU k may be a 0-d tensor on the same device.
    """
    if values.device.type == "cpu":
        return torch.tensor(_bracketed(values.detach().reshape(-1).numpy(), int(k), magnitudes), dtype=values.dtype)
    return _bisected(values.abs() if magnitudes else values, k)


def _bracketed(values: NDArray[np.floating], k: int, magnitudes: bool) -> float:
    size = values.size
    if size <= _SMALL:
        own = np.abs(values) if magnitudes else values.copy()
        own.partition(k - 1)
        return float(own[k - 1])
    chosen = values[np.random.default_rng(0).integers(0, size, min(_SAMPLE, size >> 6))]
    sample = np.sort(np.abs(chosen) if magnitudes else chosen)
    share, drawn = k / size, sample.size
    margin = 4 * math.sqrt(share * (1 - share) / drawn) + 2 / drawn
    infinity = sample.dtype.type(np.inf)
    inside = np.empty_like(values)  # of which only what is found is ever touched
    while True:
        low = sample[int((share - margin) * drawn)] if share > margin else -infinity
        high = np.nextafter(sample[int((share + margin) * drawn)], infinity) if share + margin < 1 else infinity
        below, found = kernels.bracket(values, low, high, magnitudes, inside)
        rank = k - below
        if 1 <= rank <= found:
            return float(np.partition(inside[:found], rank - 1)[rank - 1])
        margin *= 8


def _bisected(values: Tensor, k: int | Tensor) -> Tensor:
    integer, width = (torch.int64, 64) if values.dtype == torch.float64 else (torch.int32, 32)
    lowest = torch.iinfo(integer).min
    bits = values.view(integer)
    order = bits ^ ((bits >> (width - 1)) & torch.iinfo(integer).max)  # negative floats count down as they shrink
    # Build the largest integer that fewer than k entries lie below: its sign, then bit by bit from the top.
    answer = torch.where((order < 0).sum() < k, 0, lowest).to(integer)
    for position in range(width - 2, -1, -1):
        candidate = answer | (1 << position)
        answer = torch.where((order < candidate).sum() < k, candidate, answer)
    return (answer ^ ((answer >> (width - 1)) & torch.iinfo(integer).max)).view(values.dtype)
