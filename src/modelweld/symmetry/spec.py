"""The permutation symmetries of a model: which tensor axes move together, and what may move inside what.

An axis of a tensor is an ordered product of factors, each a group or frozen; a packed axis (queries, keys and values in
one projection) ends in a factor of parts, which lie one after the other. A group `within` others has a permutation of
its own for each of their elements (the dimensions of one attention head move apart from those of another), so a set of
permutations is an element of a wreath product. Its outer group is before it on the same axis, or is another axis of the
tensor (the experts of a routed layer).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Self, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor

from modelweld.errors import MergeError

Permutations = dict[str, Tensor]


@dataclass(frozen=True)
class Group:
    """One set of units. `within` names the outer groups whose every element has its own permutation of these."""

    name: str
    size: int
    within: tuple[str, ...] = ()


@dataclass(frozen=True)
class Factor:
    """A piece of an axis: a group's name, or none and why it is frozen; or `parts`, each a product of factors."""

    size: int
    group: str | None = None
    why: str | None = None
    parts: tuple[tuple[Factor, ...], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A plain product of factors, and the positions of the axis that it takes up (None: all of them)."""

    factors: tuple[Factor, ...]
    positions: tuple[int, ...] | None = None


def join(parts: Iterable[tuple[Factor, ...]]) -> Factor:
    """One factor of parts that lie one after the other."""
    found = tuple(parts)
    return Factor(sum(length(part) for part in found), parts=found)


def length(factors: Iterable[Factor]) -> int:
    """How many positions they span."""
    return math.prod(factor.size for factor in factors)


def leaves(factors: Iterable[Factor]) -> Iterator[Factor]:
    """The factors that have no parts, in order."""
    for factor in factors:
        if factor.parts:
            for part in factor.parts:
                yield from leaves(part)
        else:
            yield factor


def moves(axes: Iterable[Iterable[Factor]]) -> bool:
    """Whether any group lies on these axes."""
    return any(factor.group for axis in axes for factor in leaves(axis))


def pieces(factors: tuple[Factor, ...]) -> list[Piece]:
    """The axis as plain products: itself, or one a part."""
    if not factors or not factors[-1].parts:
        return [Piece(factors)]
    front, last = factors[:-1], factors[-1]
    found, start = [], 0
    for part in last.parts:
        for piece in pieces(part):
            inner = torch.arange(length(part)) if piece.positions is None else torch.tensor(piece.positions)
            every = torch.arange(length(front))[:, None] * last.size + start + inner  # (front, piece)
            found.append(Piece((*front, *piece.factors), tuple(every.flatten().tolist())))
        start += length(part)
    return found


# What a factor does to positions: (factor, positions, outer index) -> (moved positions, their index as an outer one).
Step = Callable[[Factor, Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]


def walk(factors: tuple[Factor, ...], step: Step, outer_index: Mapping[str, Tensor], contexts: int = 1) -> Tensor:
    """Every position of an axis moved by `step`: shape (contexts, length).

    `outer_index` holds, by outer group, which of its elements each context lies in: shape (contexts,).
    """
    if not factors:
        return torch.zeros(contexts, 1, dtype=torch.long)
    factor, rest = factors[0], factors[1:]
    if factor.parts:
        moved, start = [], 0
        for part in factor.parts:
            moved.append(walk(part, step, outer_index, contexts) + start)  # (contexts, part)
            start += length(part)
        return torch.cat(moved, dim=1)  # (contexts, length)
    positions = torch.arange(factor.size).repeat(contexts)  # (contexts · size,)
    around = {name: index.repeat_interleave(factor.size) for name, index in outer_index.items()}  # (contexts · size,)
    moved_to, index = step(factor, positions, around)
    inner = walk(rest, step, around | ({factor.group: index} if factor.group else {}), len(positions))
    # (contexts · size, rest) -> (contexts, length)
    return (moved_to[:, None] * inner.shape[1] + inner).reshape(contexts, -1)


@dataclass(frozen=True)
class Outside:
    """An outer group that has an axis of its own in a tensor."""

    group: str
    dim: int


@dataclass(frozen=True)
class Spec:
    """Groups by name, and for each tensor its axes as products of factors.

    `reads` holds the axes, as (tensor, dim), that take units in; all others give them out.
    """

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[tuple[Factor, ...], ...]]
    reads: frozenset[tuple[str, int]] = frozenset()
    unknown: Mapping[str, int] = field(default_factory=dict)

    def identity(self, names: Iterable[str] | None = None) -> Permutations:
        """The permutations that change nothing, of all groups or of these."""
        chosen = self.groups if names is None else names
        return {
            name: torch.arange(self.groups[name].size)
            .expand(*self._outer(self.groups[name]), self.groups[name].size)
            .contiguous()
            for name in chosen
        }

    def random(self, seed: int) -> Permutations:
        """Uniform permutations of every group, in every element of its outer groups, from a seed.

        >>> spec = Spec({"units": Group("units", 3)}, {"up.weight": ((Factor(3, "units"),), (Factor(2),))})
        >>> sorted(spec.random(seed=0)["units"].tolist())
        [0, 1, 2]
        """
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.rand(*self._outer(group), group.size, generator=generator).argsort(dim=-1)
            for name, group in self.groups.items()
        }

    def invert(self, permutations: Permutations) -> Permutations:
        """What undoes `permutations`: apply(apply(x, p), invert(p)) is x."""
        inverse: Permutations = {}
        for name, group in self.groups.items():
            undone = permutations[name].argsort(dim=-1)
            # Inner units belong to the element at its new position; undoing moves them back with that element.
            index = tuple(
                self._at(depth, permutations[outer].argsort(dim=-1), len(group.within))
                for depth, outer in enumerate(group.within)
            )
            inverse[name] = undone[index] if index else undone
        return inverse

    def compose(self, first: Permutations, then: Permutations) -> Permutations:
        """One step for two: apply(x, compose(p, q)) is apply(apply(x, p), q)."""
        both: Permutations = {}
        for name, group in self.groups.items():
            index = tuple(self._at(depth, then[outer], len(group.within)) for depth, outer in enumerate(group.within))
            moved = first[name][index] if index else first[name]
            both[name] = moved.gather(-1, then[name])
        return both

    def apply(self, state_dict: Mapping[str, Tensor], permutations: Permutations) -> dict[str, Tensor]:
        """The same function with its units in another order; tensors that the spec does not name are passed through.

        >>> spec = Spec({"units": Group("units", 3)}, {"up.bias": ((Factor(3, "units"),),)})
        >>> spec.apply({"up.bias": torch.tensor([10, 20, 30])}, {"units": torch.tensor([2, 0, 1])})
        {'up.bias': tensor([30, 10, 20])}
        """
        return {name: self.apply_to(name, tensor, permutations) for name, tensor in state_dict.items()}

    def apply_to(self, name: str, tensor: Tensor, permutations: Permutations) -> Tensor:
        """One tensor, permuted along each of its axes; raises MergeError when its shape is not the spec's."""
        if name not in self.axes:
            return tensor
        later = []
        for dim, factors in enumerate(self.axes[name]):
            if tensor.ndim != len(self.axes[name]) or tensor.shape[dim] != length(factors):
                raise MergeError(
                    f"is {tuple(tensor.shape)}, the symmetry spec has {[length(axis) for axis in self.axes[name]]}",
                    where=name,
                    hint="derive the spec from this model's own config",
                )
            if not moves([factors]):
                continue
            if self.outside(name, dim) is not None:
                later.append((dim, factors))
                continue
            tensor = tensor.index_select(dim, self.index(factors, permutations).to(tensor.device))
        # Inner units belong to the element at its new position: outer axes are permuted first.
        for dim, factors in later:
            outer = cast(Outside, self.outside(name, dim))
            index = self.index(factors, permutations, outer.group).to(tensor.device)
            along = dim - (outer.dim < dim)
            # One element's slice after the other: the shape stays.
            tensor = torch.stack(
                [part.index_select(along, row) for part, row in zip(tensor.unbind(outer.dim), index, strict=True)],
                dim=outer.dim,
            )
        return tensor

    def outside(self, name: str, dim: int) -> Outside | None:
        """The other axis on which the elements lie that this axis is inside of, if it is inside of any there."""
        for piece in pieces(self.axes[name][dim]):
            here = {factor.group for factor in piece.factors}
            for group in (factor.group for factor in piece.factors if factor.group):
                for outer in self.groups[group].within:
                    if outer not in here:
                        return Outside(outer, self._axis_of(name, outer))
        return None

    def index(self, factors: tuple[Factor, ...], permutations: Permutations, outer: str | None = None) -> Tensor:
        """For each new position of an axis, the old one it takes: shape (length,).

        With `outer`, a group on another axis that this one lies inside of: (elements of outer, length).
        """

        def step(factor: Factor, positions: Tensor, outer_index: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            if factor.group is None:
                return positions, positions
            around = tuple(outer_index[name] for name in self.groups[factor.group].within)
            return permutations[factor.group][(*around, positions)], positions

        if outer is None:
            return walk(factors, step, {})[0]
        elements = self.groups[outer].size
        return walk(factors, step, {outer: torch.arange(elements)}, elements)

    def _axis_of(self, name: str, group: str) -> int:
        for dim, factors in enumerate(self.axes[name]):
            if [factor.group for factor in factors] == [group]:
                return dim
        raise MergeError(
            f"a group inside of {group} lies on it, which has no axis of its own there",
            where=name,
            hint="put the outer group before the inner one on the axis, or give it a whole axis",
        )

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same groups on tensors that go by other names: `names` gives, for each new name, the present one."""
        axes = {name: self.axes[own] for name, own in names.items() if own in self.axes}
        reads = frozenset(
            (name, dim) for name, shape in axes.items() for dim in range(len(shape)) if (names[name], dim) in self.reads
        )
        return replace(self, axes=axes, reads=reads)

    def to_json(self) -> str:
        """The spec as text, for caches and for spec files given by hand."""
        document = {
            "groups": {name: asdict(group) for name, group in self.groups.items()},
            "axes": {name: [[asdict(factor) for factor in axis] for axis in axes] for name, axes in self.axes.items()},
            "reads": sorted(self.reads),
            "unknown": dict(self.unknown),
        }
        return json.dumps(document, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """The spec that `to_json` wrote, or a person by hand.

        Raises pydantic's ValidationError for text of another form, MergeError for groups that do not fit each other.
        """
        spec = TypeAdapter(Spec).validate_json(text)
        spec.check()
        return spec

    def check(self) -> None:
        """Raise MergeError, naming the group or tensor, where this is no set of groups that can be permuted."""
        for name, group in self.groups.items():
            for outer in group.within:
                if outer == name or outer not in self.groups or self.groups[outer].within:
                    raise MergeError(
                        f"lies within {outer}, which is no group that lies in none",
                        where=f"group {name}",
                        hint="name an outer group of the spec, or leave `within` empty",
                    )
        for tensor, shape in self.axes.items():
            for dim, factors in enumerate(shape):
                self._check_axis(tensor, dim, factors)

    def _check_axis(self, tensor: str, dim: int, factors: tuple[Factor, ...]) -> None:
        where = f"{tensor}, axis {dim}"
        inner = [factor for factor in factors[:-1] if factor.parts]
        if not factors or inner:
            raise MergeError(
                "parts may only come last on an axis" if inner else "has no factors", where=where, hint="see `--spec`"
            )
        for factor in leaves(factors):
            if factor.size < 1 or (factor.group is not None and factor.group not in self.groups):
                raise MergeError(
                    f"names the group {factor.group} of {factor.size} units, which is not among the groups",
                    where=where,
                    hint="add it to `groups`, or set group to null to keep the axis as it is",
                )
            if factor.group is not None and factor.size != self.groups[factor.group].size:
                raise MergeError(
                    f"has {factor.size} units of {factor.group}, which has {self.groups[factor.group].size}",
                    where=where,
                    hint="write a length that the group divides as a product of factors",
                )
        last = factors[-1]
        if last.parts and last.size != sum(length(part) for part in last.parts):
            raise MergeError("its parts do not add up to its size", where=where, hint=f"their sum, not {last.size}")
        self.outside(tensor, dim)

    def _outer(self, group: Group) -> list[int]:
        return [self.groups[name].size for name in group.within]

    @staticmethod
    def _at(depth: int, permutation: Tensor, dims: int) -> Tensor:
        if permutation.ndim != 1:
            raise MergeError("a group inside a group that is itself nested is not supported", hint="freeze one of them")
        shape = [1] * dims
        shape[depth] = -1
        return permutation.reshape(shape)  # (1, …, elements, …, 1), to broadcast against inner permutations
