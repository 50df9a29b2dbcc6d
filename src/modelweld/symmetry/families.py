"""Families: a group together with all that lies inside its elements, which have to be matched at once.

A family is compared by *views* of the models' tensors: for every axis that it lies on, the tensor with the units of
that axis in front and everything else as features. Groups of other families are permuted to model 0's order first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modelweld.symmetry.spec import Piece, Spec, leaves, length, pieces

# Running statistics are permuted with their channels, and tell no more than the activations do.
STATISTICS = ("running_mean", "running_var")


class Placement(Protocol):
    """The current assignment of each model's units."""

    def tensor(self, name: str, tensor: Tensor, model: int, *, but: tuple[str, ...] = ()) -> Tensor:
        """One model's tensor in the common order; the groups `but` keep their own."""
        ...


@dataclass(frozen=True)
class AxisUse:
    """One axis of one tensor, or a piece of it, on which a group lies.

    Each unit has `features` numbers there; `neighbours` are the families whose order has to be known to compare them.
    `outer` is the axis of the elements that the units lie inside of, where that is another one.
    """

    tensor: str
    dim: int
    piece: Piece
    features: int
    neighbours: frozenset[str]
    outer: int | None = None


@dataclass(frozen=True)
class Family:
    """An outer group, the groups inside it, and where each is seen: alone (`""`) or with one inner group."""

    outer: str
    inner: tuple[str, ...]
    uses: Mapping[str, tuple[AxisUse, ...]]
    neighbours: frozenset[str]

    @property
    def members(self) -> tuple[str, ...]:
        """The outer group and what lies inside it."""
        return (self.outer, *self.inner)

    def of(self, member: str) -> tuple[AxisUse, ...]:
        """Where a member's units can be compared."""
        return self.uses.get("" if member == self.outer else member, ())


def families(spec: Spec) -> dict[str, Family]:
    """Every family by the name of its outer group, in the order of the spec."""
    inner: dict[str, list[str]] = {name: [] for name, group in spec.groups.items() if not group.within}
    for name, group in spec.groups.items():
        if group.within:
            inner[group.within[0]].append(name)
    home = {member: outer for outer, members in inner.items() for member in (outer, *members)}
    uses: dict[str, dict[str, list[AxisUse]]] = {outer: {} for outer in inner}
    neighbours: dict[str, set[str]] = {outer: set() for outer in inner}
    for name, axes in spec.axes.items():
        here = {home[factor.group] for axis in axes for factor in leaves(axis) if factor.group}
        elements = math.prod(length(axis) for axis in axes)
        for outer in here:
            neighbours[outer] |= here - {outer}
        if name.endswith(STATISTICS):
            continue
        outside = [spec.outside(name, dim) for dim in range(len(axes))]
        split = {found.group for found in outside if found is not None}
        for dim, factors in enumerate(axes):
            for piece in pieces(factors):
                groups = [factor.group for factor in piece.factors if factor.group]
                for outer in dict.fromkeys(home[group] for group in groups):
                    inside = [group for group in groups if group != outer and home[group] == outer]
                    # Where two inner groups share an axis neither can be read without knowing the other; nor can
                    # elements by themselves where their insides lie on another axis.
                    if len(inside) > 1 or (not inside and outer in split):
                        continue
                    units = math.prod(spec.groups[group].size for group in (outer, *inside))
                    own = elements // length(factors) * length(piece.factors)
                    found = outside[dim]
                    apart = found.dim if found is not None and inside and found.group == outer else None
                    use = AxisUse(name, dim, piece, own // units, frozenset(here - {outer}), apart)
                    uses[outer].setdefault(inside[0] if inside else "", []).append(use)
    return {
        outer: Family(
            outer, tuple(members), {k: tuple(v) for k, v in uses[outer].items()}, frozenset(neighbours[outer])
        )
        for outer, members in inner.items()
    }


def view(
    family: Family, member: str, use: AxisUse, states: Sequence[Mapping[str, Tensor]], placed: Placement
) -> Tensor:
    """All models' tensors at a member's use as (models, units, features), in float64.

    Units are the outer group's, or (outer · inner) where the member is an inner group; the family itself stays in each
    model's own order, every other one is where `placed` puts it.
    """
    stacked = torch.stack(
        [
            placed.tensor(use.tensor, state[use.tensor].double(), model, but=family.members)
            for model, state in enumerate(states)
        ]
    )  # (models, *shape of the tensor)
    wanted = {family.outer, member}
    found, front = split(stacked, use.dim + 1, use.piece, wanted)  # (models, …, factor, …, factor, …)
    if use.outer is not None:
        shift = len(use.piece.factors) - 1 if use.outer > use.dim else 0
        front = [use.outer + 1 + shift, *front]
    rest = [dim for dim in range(1, found.ndim) if dim not in front]
    ordered = found.permute(0, *front, *rest)  # (models, outer, inner, …features)
    return ordered.reshape(len(states), math.prod(found.shape[dim] for dim in front), -1)  # (models, units, features)


def split(tensor: Tensor, dim: int, piece: Piece, wanted: Collection[str]) -> tuple[Tensor, list[int]]:
    """A tensor's axis as a piece's factors, one axis each, and which of these are the wanted groups'."""
    if piece.positions is not None:
        tensor = tensor.index_select(dim, torch.tensor(piece.positions, device=tensor.device))  # (…, piece, …)
    sizes = [factor.size for factor in piece.factors]
    found = tensor.reshape(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])  # (…, factor, …, factor, …)
    return found, [dim + depth for depth, factor in enumerate(piece.factors) if factor.group in wanted]
