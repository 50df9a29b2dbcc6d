"""Greedy merging of units, within and across models, until as many remain as one model has (ZipIt's matching).

The pair of greatest similarity is merged, the merged row becomes `beta` times the smaller of the two, and so on.
Searching the whole matrix at every step costs O(units³); keeping each row's maximum, and searching again only the rows
whose maximum was touched (`greedy`), costs about O(units²) with the same merges in the same order.
Source: the matching of arXiv 2305.03053 as used by MuDSC (arXiv 2403.01753); the row maxima are this project's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelweld.errors import MergeError

Similarities = NDArray[np.float32]
REMOVED = np.float32(-np.inf)
_LINE = 16


@dataclass(frozen=True)
class Zip:
    """`cluster[u]` is the merged unit that unit u (model-major) went to; `value` the mean similarity of the merges."""

    cluster: NDArray[np.int64]
    merged: int
    value: float

    def sizes(self) -> NDArray[np.int64]:
        """How many units went into each merged one, shape (merged,)."""
        return np.bincount(self.cluster, minlength=self.merged)


def zip_units(similarities: Similarities, models: int, *, beta: float = 0.5, budget: float = 1.0) -> Zip:
    """Merge models·units units down to `units`.

    `similarities` is (models·units, models·units), `beta` multiplies the similarity of a merged unit, and
    `budget` in [0, 1] is the share of merges that may join two units of one model. Raises MergeError when the budgets
    leave no pair to merge: never a unit with itself. Ties go to the lowest index.
    """
    total = len(similarities)
    if total % models:
        raise MergeError(f"{total} units do not divide among {models} models")
    if not np.isfinite(similarities).all():
        raise MergeError("a similarity is not finite", hint="look for NaN or infinite activations or weights")
    # numba takes a second to import, which only zipping needs.
    from modelweld.symmetry.greedy import merge_greedily

    units = total // models
    merges = total - units
    # Rows whose length is a power of two would all map to the same few cache lines.
    matrix = np.empty((total, total + merges + _LINE), np.float32)  # (models · units, models · units + merges)
    matrix[:, :total] = similarities
    np.fill_diagonal(matrix, REMOVED)
    bound = matrix[:, :total].max(axis=1, initial=REMOVED)  # (models · units,)
    owner, alive = np.arange(total), np.arange(total, dtype=np.int32)
    model_of = np.repeat(np.arange(models), units)
    left = np.full(models, int(merges // models * budget + 1e-4))
    values = np.empty(merges, np.float32)
    made = merge_greedily(matrix, bound, model_of, left, np.float32(beta), owner, alive, values)
    if made < merges:
        raise MergeError(
            f"no pair is left to merge after {made} of {merges} merges",
            hint="allow more merges inside one model: a larger `budget`",
        )
    while True:
        further = owner[owner]
        if (further == owner).all():
            break
        owner = further
    number = np.zeros(total, np.int64)
    number[alive[:units]] = np.arange(units)
    return Zip(number[owner], units, float(values.mean()) if merges else 0.0)
