"""A plan's inputs seen through a placement: every expert's units in their place, tensor by tensor as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from modelweld.alignment.models import Member, moves
from modelweld.engine import Inputs
from modelweld.symmetry.placements import Folded, Permuted
from modelweld.symmetry.view import AlignedCheckpoint


def placed_inputs(inputs: Inputs, members: Sequence[Member], placed: Permuted | Folded) -> Inputs:
    """The inputs with every expert seen through its placement; the base stays as it is."""
    positions = {member.label: position for position, member in enumerate(members)}
    experts = []
    for expert in inputs.experts:
        position = positions[expert.label]
        experts.append(replace(expert, checkpoint=_view(members[position], placed, position)))
    return replace(inputs, experts=tuple(experts))


def _view(member: Member, placed: Permuted | Folded, position: int) -> AlignedCheckpoint:
    own = replace(placed, spec=member.spec)
    moved = [
        name
        for name, axes in member.spec.axes.items()
        if name in member.checkpoint.tensors and moves(axes) and member.checkpoint.tensors[name].dtype.is_floating_point
    ]
    if isinstance(placed, Permuted):
        return AlignedCheckpoint(member.checkpoint, partial(_permuted, own, position), moved)
    return AlignedCheckpoint(member.checkpoint, partial(_folded, own, position), moved, torch.float32)


def _permuted(placed: Permuted | Folded, position: int, name: str, tensor: Tensor) -> Tensor:
    return placed.tensor(name, tensor, position)


def _folded(placed: Permuted | Folded, position: int, name: str, tensor: Tensor) -> Tensor:
    return placed.tensor(name, tensor.double(), position)
