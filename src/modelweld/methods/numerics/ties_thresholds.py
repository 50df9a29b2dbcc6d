"""TIES over a stream: what it has to know of a whole tensor, found in one pass over its chunks, exactly.

A tensor's trim thresholds and its majority sign depend on every entry, but nothing else does: with both known, any
chunk is merged by itself. So a tensor is read twice, the second time from the page cache, and never held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from modelweld.methods.numerics import kernels
from modelweld.methods.numerics.kernels import Floats

Passes = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass
class TiesStatistics:
    """What TIES has to know of a whole tensor: each model's trim threshold `(N,)` and the majority's sign.

    `kept` counts, over all models, the entries other than 0 that reach their threshold, `agreeing` those of them that
    have the elected sign. Where a threshold is 0, and for the signs, merging counts what it passes.
    """

    thresholds: Floats
    vote: float
    kept: int
    agreeing: int = 0

    def count(self, nonzero: int, agreeing: int) -> None:
        """Add what a chunk's merge has counted."""
        self.kept += nonzero
        self.agreeing += agreeing

    def diagnostics(self, elements: int) -> dict[str, float]:
        """The share of the entries that is kept, and of these the share that is outvoted."""
        return {
            "kept_share": self.kept / max(elements * len(self.thresholds), 1),
            "sign_conflicts": (self.kept - self.agreeing) / max(self.kept, 1),
        }


def ties_statistics(passes: Passes, sample: Tensor, elements: int, density: float) -> TiesStatistics:
    """The thresholds, exact as `selection.magnitude_threshold` of the whole tensor, and what most entries elect.

    `passes()` yields a tensor's chunks: the experts' `(N, n)` and the base's `(n,)`; `sample` `(N, s)` are task vectors
    that bracket the thresholds. One pass counts what lies below a bracket and keeps the few entries inside; outside it
    is certain what will be trimmed, so that the same pass counts the votes there, and those inside are counted when the
    thresholds are known. A bracket that missed is widened, for another pass.
    """
    # Rank 1 stands for 0 as well: the smallest magnitude as a threshold trims nothing either.
    rank = max(elements - round(elements * density), 1)
    magnitudes = np.sort(np.abs(sample.numpy()), axis=1)  # (N, s)
    share = rank / elements
    # Neighbouring entries are alike, so a sample of blocks is worth less than one of single entries.
    margin = 8 * math.sqrt(share * (1 - share) / magnitudes.shape[1]) + 2 / magnitudes.shape[1]
    while True:
        found = _Pass(magnitudes, share, margin)
        for stack, origin in passes():
            found.take(stack.numpy(), origin.numpy())
        known = found.statistics(rank)
        if known is not None:
            return known
        margin *= 8


class _Pass:
    """One pass over a tensor with a bracket [low, high), from its sampled magnitudes, for each model's threshold."""

    def __init__(self, magnitudes: Floats, share: float, margin: float) -> None:
        count, size = magnitudes.shape
        infinity = magnitudes.dtype.type(math.inf)
        self._low, self._high = np.full(count, -1, magnitudes.dtype), np.full(count, infinity)
        if share > margin:
            self._low[:] = magnitudes[:, int((share - margin) * size)]
        if share + margin < 1:
            self._high[:] = np.nextafter(magnitudes[:, int((share + margin) * size)], infinity)
        # In half precision, or where little was trained, many entries are equal: these need only be counted.
        self._point = np.nextafter(self._low, infinity) == self._high
        self._sure = np.where(self._point, self._low, self._high)
        self._counts = np.zeros((count, 2), np.int64)
        self._votes = self._elements = 0
        self._unsure: list[Floats] = []
        self._room = np.empty((count, 0), magnitudes.dtype)

    def take(self, stack: Floats, origin: Floats) -> None:
        """Count one chunk."""
        if self._room.shape[1] < origin.size:
            self._room = np.empty((len(stack), origin.size), stack.dtype)
        votes, found = kernels.survey(stack, origin, self._low, self._high, self._sure, self._counts, self._room)
        self._votes += votes
        self._elements += origin.size
        self._unsure.append(self._room[:, :found].copy())

    def statistics(self, rank: int) -> TiesStatistics | None:
        """What the pass has found; None when a threshold lies outside its bracket."""
        thresholds, kept = self._low.copy(), 0
        for index, (below, reached) in enumerate(self._counts.tolist()):
            if not below < rank <= reached:
                return None
            less = 0
            if not self._point[index]:
                thresholds[index], less = self._inside(index, rank - below)
            kept += self._elements - below - less if thresholds[index] > 0 else 0
        # Piece by piece: together the open columns of a large tensor would be as large as a small one.
        votes = self._votes + sum(_votes(piece, thresholds) for piece in self._unsure)
        return TiesStatistics(thresholds, float(np.sign(votes)), kept)

    def _inside(self, index: int, position: int) -> tuple[np.floating[Any], int]:
        """Of a model's magnitudes in its bracket the one at `position`, from 1, in their order; how many are less."""
        found = []
        for piece in self._unsure:
            sizes = np.abs(piece[index])
            found.append(sizes[(sizes >= self._low[index]) & (sizes < self._high[index])])
        parted = np.partition(np.concatenate(found), position - 1)
        answer: np.floating[Any] = parted[position - 1]
        return answer, int(np.count_nonzero(parted[:position] < answer))


def _votes(deltas: Floats, thresholds: Floats) -> int:
    kept = np.where(np.abs(deltas) >= thresholds[:, None], deltas, deltas.dtype.type(0))
    total = kept[0].copy()
    for row in kept[1:]:
        total += row
    return int(np.count_nonzero(total > 0)) - int(np.count_nonzero(total < 0))
