"""The partition of a merge among several processes: fixed before they start, balanced, and reproducible."""

from __future__ import annotations

from collections.abc import Sequence

from modelweld.engine.cost.estimate import flops
from modelweld.engine.plan.records import TensorPlan

# What a core computes while it reads a byte, roughly: only the balance rests on it.
_FLOPS_A_BYTE = 100.0


def partition(tensors: Sequence[TensorPlan], experts: int, count: int) -> list[list[TensorPlan]]:
    """At most `count` parts of about equal cost, none empty, each in the order of `tensors`.

    The costliest tensor goes first, always to the part that has least so far. Each part runs through the files from
    the front, so that output shards fill, and are synced, one after the other.
    """
    costs = [tensor.read_bytes + tensor.write_bytes + flops(tensor, experts) / _FLOPS_A_BYTE for tensor in tensors]
    filled = [0.0] * min(count, len(tensors))
    owned: list[list[int]] = [[] for _ in filled]
    for position in sorted(range(len(tensors)), key=lambda position: (-costs[position], position)):
        least = min(range(len(filled)), key=lambda share: (filled[share], len(owned[share]), share))
        filled[least] += costs[position]
        owned[least].append(position)
    return [[tensors[position] for position in sorted(positions)] for positions in owned]
