"""The loop of zipping as machine code: take the most similar pair, merge it, update what that touched, and again.

A pair (low, high) is looked for in the row of its lower unit. For every row the greatest entry is known, or, once its
partner was merged away, a bound on it: such a row is searched again only when no other row can be greater.

What is merged gets a new column, behind the others. So the columns of one merge after another lie side by side, and
writing one down does not fetch a line of memory a row: with wide layers that is most of the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modelweld.compiling import compiled

REMOVED = np.float32(-np.inf)
UNKNOWN = -1


@compiled
def merge_greedily(
    matrix: Any, bound: Any, model_of: Any, left: Any, beta: Any, owner: Any, alive: Any, values: Any
) -> int:
    """How many of `len(values)` merges were made; fewer where no pair was left.

    `matrix` (units, units + merges) holds the similarities and room for what is merged, no similarity of a row with
    another unit exceeds its `bound`, and `left` is how often each model may still merge two of its own units. All
    arrays are changed in place: `owner[u]` is what u was merged into, and of `alive`, at first every unit in order, the
    first len(matrix) - merges entries are left.
    """
    partner = np.full(len(matrix), UNKNOWN, np.int32)
    column = np.arange(len(matrix), dtype=np.int32)
    living = len(alive)
    for model in range(len(left)):
        if left[model] <= 0:
            _forbid(matrix, column, partner, alive, model_of, model)
    for step in range(len(values)):
        low = _best_row(matrix, column, bound, partner, alive[:living])
        if bound[low] == REMOVED:
            return step
        values[step], high = bound[low], partner[low]
        owner[high] = low
        _join(matrix, column, bound, partner, alive[:living], low, high, beta, len(matrix) + step)
        living -= 1
        model = model_of[low]
        if model == model_of[high]:
            left[model] -= 1
            if left[model] <= 0:
                _forbid(matrix, column, partner, alive[:living], model_of, model)
    return len(values)


@compiled
def _best_row(matrix: Any, column: Any, bound: Any, partner: Any, alive: Any) -> Any:
    """The first row whose greatest entry no other exceeds."""
    while True:
        best = alive[0]
        for unit in alive[1:]:
            if bound[unit] > bound[best]:
                best = unit
        if partner[best] != UNKNOWN or bound[best] == REMOVED:
            return best
        most = REMOVED
        for position in range(len(alive) - 1, -1, -1):
            unit = alive[position]
            if unit == best:
                break
            # From the end: of equal entries the first one stays.
            if matrix[best, column[unit]] >= most:
                most = matrix[best, column[unit]]
                partner[best] = unit
        bound[best] = most


@compiled
def _join(
    matrix: Any, column: Any, bound: Any, partner: Any, alive: Any, low: Any, high: Any, beta: Any, new: Any
) -> None:
    """Put `high` into `low`, whose column is then the new one, and take it out of `alive`: its last entry is free."""
    kept, most, found = 0, REMOVED, UNKNOWN
    for unit in alive:
        if unit == high:
            continue
        alive[kept] = unit
        kept += 1
        if unit == low:
            continue
        here = column[unit]
        least = min(matrix[low, here], matrix[high, here])
        joined = least if least == REMOVED else least * beta
        matrix[low, here] = joined
        matrix[unit, new] = joined
        if unit > low:
            if joined > most:
                most, found = joined, unit
            if partner[unit] == high:
                partner[unit] = UNKNOWN
        elif joined > bound[unit]:
            bound[unit] = joined
            partner[unit] = low
        elif partner[unit] == low or partner[unit] == high:
            partner[unit] = UNKNOWN
        elif joined == bound[unit] and low < partner[unit]:
            partner[unit] = low
    bound[low], partner[low], column[low] = most, found, new


@compiled
def _forbid(matrix: Any, column: Any, partner: Any, alive: Any, model_of: Any, model: Any) -> None:
    """Let no two units of one model merge."""
    for unit in alive:
        if model_of[unit] == model:
            partner[unit] = UNKNOWN
            for other in alive:
                if model_of[other] == model:
                    matrix[unit, column[other]] = REMOVED
