"""A plan's inputs with every expert's units in the common order, permuted tensor by tensor as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from modelweld.alignment.models import AlignedModel, moves
from modelweld.engine import Inputs
from modelweld.symmetry.placements import Clustered, Permuted
from modelweld.symmetry.view import AlignedCheckpoint


def placed_inputs(inputs: Inputs, models: Sequence[AlignedModel], placed: Permuted | Clustered) -> Inputs:
    """The inputs with every expert in the common order; the base stays as it is."""
    positions = {model.label: position for position, model in enumerate(models)}
    experts = []
    for expert in inputs.experts:
        position = positions[expert.label]
        experts.append(replace(expert, checkpoint=_view(models[position], placed, position)))
    return replace(inputs, experts=tuple(experts))


def _view(model: AlignedModel, placed: Permuted | Clustered, position: int) -> AlignedCheckpoint:
    own = replace(placed, spec=model.spec)
    moved = [
        name
        for name, axes in model.spec.axes.items()
        if name in model.checkpoint.tensors and moves(axes) and model.checkpoint.tensors[name].dtype.is_floating_point
    ]
    if isinstance(placed, Permuted):
        return AlignedCheckpoint(model.checkpoint, partial(_permuted, own, position), moved)
    return AlignedCheckpoint(model.checkpoint, partial(_clustered, own, position), moved, torch.float32)


def _permuted(placed: Permuted | Clustered, position: int, name: str, tensor: Tensor) -> Tensor:
    return placed.tensor(name, tensor, position)


def _clustered(placed: Permuted | Clustered, position: int, name: str, tensor: Tensor) -> Tensor:
    return placed.tensor(name, tensor.double(), position)
