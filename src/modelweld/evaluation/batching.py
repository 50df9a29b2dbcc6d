"""Batches of rows of similar length, to minimise padding."""

from __future__ import annotations

from collections.abc import Sequence


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers in batches whose padded size (rows × longest row) stays within `budget` tokens, the longest first.

    The order depends on the lengths alone: equal lengths keep the rows' order. The longest batch comes first so that
    a budget which does not fit the device fails at once. A row longer than the budget is a batch of its own.

    >>> token_batches([3, 9, 4, 4], budget=9)
    [[1], [2, 3], [0]]
    """
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batches and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = lengths[row]
    return batches
