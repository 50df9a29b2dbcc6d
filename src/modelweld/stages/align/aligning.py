"""From a plan's inputs to the same inputs in one order of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from modelweld.config import Recipe
from modelweld.errors import ConfigError, MergeError
from modelweld.merging.engine import Inputs, Plan
from modelweld.merging.registry import method
from modelweld.stages.align.members import Member, base_member, members_of, moves
from modelweld.stages.align.record import Aligned, document_of, notes_of, places_of
from modelweld.stages.align.search import search
from modelweld.symmetry.placements import Folded, Permuted
from modelweld.symmetry.view import AlignedCheckpoint


def aligned(recipe: Recipe, plan: Plan, inputs: Inputs, root: Path) -> Aligned:
    """The inputs of a plan in one order of units; specs are cached below `root`.

    The first expert's order is the common one, or the base's where the plan reads it. Raises MergeError for models that
    cannot be aligned, a symmetry that does not hold, and calibration rows that do not do; InputError for the rows
    themselves.
    """
    settings = recipe.alignment
    if settings is None:
        raise ConfigError("the recipe asks for no alignment", where="align", mend="align: {}")
    adapter = next((expert.label for expert in inputs.experts if expert.adapter is not None), None)
    if adapter is not None:
        raise ConfigError(
            f"{adapter} is an adapter: its units are its base's, in the base's order already",
            where="align",
            mend="merge adapters without `align:`, or fold each into its base first",
        )
    if len(inputs.experts) < 2:
        raise MergeError("alignment takes two models or more", where="models", mend="name another one")
    common, experts = members_of(settings, inputs, root)
    members = list(experts)
    if _reads_base(plan, inputs, frozenset(name for name, axes in common.axes.items() if moves(axes))):
        if settings.mode == "zip":
            raise MergeError(
                f"zip merges units across models, and {recipe.method_name} (or a rule) reads the base",
                where="align.mode",
                mend="use mode: align, or a method that needs no base",
            )
        members.insert(0, base_member(inputs, common))
    found = search(settings, common, members, inputs)
    document = document_of(settings, common, members, found)
    views = placed_inputs(inputs, members, found.placement.placed)
    return Aligned(views, document, places_of(members, found), notes_of(document, plan))


def placed_inputs(inputs: Inputs, members: Sequence[Member], placed: Permuted | Folded) -> Inputs:
    """The inputs with every expert seen through its placement; the base stays as it is."""
    positions = {member.label: position for position, member in enumerate(members)}
    experts = []
    for expert in inputs.experts:
        position = positions[expert.label]
        experts.append(replace(expert, checkpoint=_view(members[position], placed, position)))
    return replace(inputs, experts=tuple(experts))


def _reads_base(plan: Plan, inputs: Inputs, moved: frozenset[str]) -> bool:
    if inputs.base is None:
        return False
    for tensor in plan.tensors:
        if tensor.name not in moved:
            continue
        chosen = method(tensor.parameters.method) if tensor.parameters else None
        if chosen is None or chosen.needs_base or chosen.whole_matrix:
            return True
    return False


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
