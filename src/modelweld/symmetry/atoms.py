"""Atoms: the pieces of tensor axes that can be permuted on their own.

An axis is an ordered list of atoms whose sizes multiply to its length: the columns of an output projection are
`[heads, head_dim]`. Operations identify atoms (`unify`), factorise them (`view`) or pin them (`freeze`); what is left
free at the end are the symmetries. Axes of length one carry no atom.

An atom may be permuted apart at each position of another one: a packed projection's rows are (piece, unit), and the
units of queries are not those of values; every expert of a layer has hidden units of its own. `at` gives the copy of an
axis at one such position, and `settle` joins the copies again where there turns out to be no difference.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence


class UnsupportedOp(Exception):
    """Two axes cannot be brought to one factorisation."""


class Atom:
    """One piece of an axis; after a union `leader` is the atom that represents it, after a split `parts` do.

    Where it differs by position of the atom `along`, `copies` holds the axis at each of these positions.
    """

    __slots__ = ("along", "copies", "frozen", "leader", "parts", "size")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.leader: Atom | None = None
        self.parts: tuple[Atom, Atom] | None = None
        self.along: Atom | None = None
        self.copies: dict[Hashable, Axis] = {}

    def __repr__(self) -> str:
        return f"Atom({self.size}{', frozen: ' + self.frozen if self.frozen else ''})"


Axis = list[Atom]
Axes = list[Axis]


def leader(atom: Atom) -> Atom:
    """The atom that represents this one."""
    while atom.leader is not None:
        atom = atom.leader
    return atom


def expand(axis: Iterable[Atom]) -> Axis:
    """The axis in its finest known factorisation, leaders only."""
    out: Axis = []
    for atom in axis:
        head = leader(atom)
        if head.parts is not None:
            out += expand(head.parts)
        elif head.size != 1:
            out.append(head)
    return out


def fresh(sizes: Sequence[int], frozen: str | None = None) -> Axes:
    """New axes of these lengths, one atom each."""
    return [[Atom(size, frozen)] if size != 1 else [] for size in sizes]


def freeze(axis: Iterable[Atom], why: str) -> None:
    """Freeze every atom of the axis, and its copies; the first reason is kept."""
    for atom in expand(axis):
        if not atom.frozen:
            atom.frozen = why
            for copy in atom.copies.values():
                freeze(copy, why)


def at(axis: Iterable[Atom], along: Atom, position: Hashable) -> Axis:
    """The axis at one position of the atom `along`; frozen atoms, and `along` itself, are the same at all."""
    out: Axis = []
    for atom in expand(axis):
        if atom.frozen or atom is leader(along):
            out.append(atom)
            continue
        if atom.along is None:
            atom.along = along
        elif not _same(atom.along, along):
            # It cannot differ along two things.
            settle(atom)
            out += expand([atom])
            continue
        out += atom.copies.setdefault(position, [Atom(atom.size)])
    return out


def settle(atom: Atom) -> None:
    """Undo that an atom differs along another: all its copies become itself."""
    copies, atom.along, atom.copies = list(atom.copies.values()), None, {}
    for copy in copies:
        unify([atom], copy, "settle")


def length(axis: Iterable[Atom]) -> int:
    """How many positions the axis has."""
    return math.prod(atom.size for atom in expand(axis))


def split(atom: Atom, outer: int) -> tuple[Atom, Atom]:
    """Factorise one atom into an outer one of `outer` positions and what is inside it."""
    if atom.size % outer:
        raise UnsupportedOp(f"{atom.size} does not divide by {outer}")
    first, second = atom.parts = (Atom(outer, atom.frozen), Atom(atom.size // outer, atom.frozen))
    if atom.along is not None:
        first.along = second.along = atom.along
        for position, copy in atom.copies.items():
            try:
                first.copies[position], second.copies[position] = view([copy], [outer, second.size])
            except UnsupportedOp as error:
                for each in (*atom.copies.values(), atom.parts):
                    freeze(each, str(error))
                raise
    return atom.parts


def unify(left: Iterable[Atom], right: Iterable[Atom], why: str) -> None:
    """Make both axes one: the same positions, always permuted together. What cannot be matched is frozen."""
    try:
        pairs = _common(left, right)
    except UnsupportedOp:
        freeze(left, f"misfit at {why}")
        freeze(right, f"misfit at {why}")
        return
    for a, b in pairs:
        first, second = leader(a), leader(b)
        if first is second:
            continue
        if first.parts is not None or second.parts is not None:
            # An earlier pair split an atom that occurs twice.
            unify([first], [second], why)
            continue
        _join(first, second)


def _join(first: Atom, second: Atom) -> None:
    second.leader = first
    why = first.frozen or second.frozen
    copies = list(second.copies.items())
    if first.along is None:
        first.along, first.copies = second.along, dict(copies)
    elif second.along is not None and not _same(first.along, second.along):
        settle(first)
        for _, copy in copies:
            unify([first], copy, "settle")
    else:
        for position, copy in copies:
            if position in first.copies:
                unify(first.copies[position], copy, "settle")
            else:
                first.copies[position] = copy
    if why:
        head = leader(first)
        head.frozen = None
        freeze([head], why)


def _same(one: Atom, other: Atom) -> bool:
    ours, theirs = expand([one]), expand([other])
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))


def _common(left: Iterable[Atom], right: Iterable[Atom]) -> list[tuple[Atom, Atom]]:
    one, two = expand(left), expand(right)
    pairs: list[tuple[Atom, Atom]] = []
    while one and two:
        a, b = one[0], two[0]
        if a.parts is not None or b.parts is not None:
            one, two = expand(one), expand(two)
            continue
        if a.size == b.size:
            pairs.append((a, b))
            del one[0], two[0]
        elif a.size % b.size == 0:
            one[:1] = split(a, b.size)
        elif b.size % a.size == 0:
            two[:1] = split(b, a.size)
        else:
            raise UnsupportedOp(f"{a.size} against {b.size}")
    if one or two:
        raise UnsupportedOp("axes of different lengths")
    return pairs


def view(axes: Axes, sizes: Sequence[int]) -> Axes:
    """The axes of a reshaped tensor: atoms are redistributed in order, and split where an axis is cut."""
    pending = [atom for axis in axes for atom in expand(axis)]
    out: Axes = []
    for size in sizes:
        axis: Axis = []
        need = size
        while need > 1:
            if not pending:
                raise UnsupportedOp("view needs more positions than there are")
            atom = leader(pending.pop(0))
            if atom.parts is not None:
                pending[:0] = expand([atom])
            elif need % atom.size == 0:
                axis.append(atom)
                need //= atom.size
            elif atom.size % need == 0:
                outer, inner = split(atom, need)
                axis.append(outer)
                pending.insert(0, inner)
                need = 1
            else:
                raise UnsupportedOp(f"view cuts {atom.size} at {need}")
        out.append(axis)
    return out
