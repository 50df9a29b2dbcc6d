"""Which unit of another model is which unit here: linear assignment, plain and nested.

Every function takes a similarity whose rows are model 0's units and whose columns are the other model's, and returns
for each row the column that is assigned to it. Ties are broken the same way everywhere: staying in place first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from modelweld.errors import MergeError

Matrix = NDArray[np.float64]
Indices = NDArray[np.int64]

# Large enough to decide between dead units (whose similarities are all equal), far below any real difference.
STAY = 1e-12


@dataclass(frozen=True)
class Nested:
    """A match of outer elements and, for each, of what is inside: `inner[a]` belongs to row a of `outer`."""

    outer: Indices
    inner: dict[str, Indices]
    value: float


def match(similarity: Matrix, *, stay: bool = True) -> tuple[Indices, float]:
    """The assignment of greatest mean similarity, shape (units,), and that mean.

    Without `stay`, ties fall as the solver lets them. Raises MergeError for non-finite entries, which no assignment
    can weigh.
    """
    _check(similarity)
    units = len(similarity)
    scale = max(float(similarity.max(initial=0.0)), -float(similarity.min(initial=0.0))) or 1.0
    weighed = similarity.copy()
    np.einsum("ii->i", weighed)[:] += stay * STAY * scale
    _, columns = linear_sum_assignment(weighed, maximize=True)
    return columns.astype(np.int64), float(similarity[np.arange(units), columns].mean())


def match_nested(inner: dict[str, Matrix], outer: Matrix | None = None, *, stay: bool = True) -> Nested:
    """One outer order for all that lies inside it: heads with their query/key and value dimensions.

    `inner[name]` has shape (A, B, A, B): element a's unit b here against element c's unit d there; `outer` (A, A) holds
    what is known of the outer elements alone. Every pair of elements is matched inside, the scores of all names are
    added, and the outer assignment is made once on the sum, so that queries and values cannot disagree on it.
    """
    elements = len(outer) if outer is not None else len(next(iter(inner.values())))
    scores = np.zeros((elements, elements)) if outer is None else outer.astype(np.float64).copy()  # (A, A)
    found: dict[str, Indices] = {}
    for name, similarity in inner.items():
        units = similarity.shape[1]
        found[name] = np.zeros((elements, elements, units), dtype=np.int64)  # (A, A, B)
        for row in range(elements):
            for column in range(elements):
                found[name][row, column], value = match(similarity[row, :, column, :], stay=stay)  # (B, B) -> (B,)
                scores[row, column] += value
    order, value = match(scores, stay=stay)
    rows = np.arange(elements)
    kinds = len(inner) + (outer is not None)
    return Nested(order, {name: columns[rows, order] for name, columns in found.items()}, value / kinds)  # (A, B) each


def _check(similarity: Matrix) -> None:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise MergeError(f"a similarity of shape {similarity.shape} is not square", hint="compare models of one width")
    if not np.isfinite(similarity).all():
        raise MergeError(
            "a similarity is not finite",
            hint="look for NaN or infinite activations in the calibration set, or weights that overflow",
        )
