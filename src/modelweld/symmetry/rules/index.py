"""Tables that are read by position, and positions that name an axis.

Numbers that name positions (the experts that a router chose) are no ordinary numbers: they follow the axis that they
name. `topk` makes them, the operations of CARRIES pass them on, those of CHOOSES select by them, and any other
operation freezes the axis.
"""

from __future__ import annotations

from torch.fx import Node

from modelweld.symmetry.atoms import Axes, at, expand, freeze, fresh, unify
from modelweld.symmetry.rules.call import Call, Choice, Result, rule

RANK = "rank"
# Operations that only move numbers: positions that they name stay the same.
CARRIES = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t"}
) | frozenset(
    {"unsqueeze", "squeeze", "clone", "_to_copy", "alias", "detach", "to", "contiguous", "expand", "lift_fresh_copy"}
)
# Operations whose rules look up what an index names.
CHOOSES = frozenset({"index", "gather"})


@rule("embedding")
def embedding(call: Call) -> Result:
    table, positions = call.axes(call.node.args[0]), call.axes(call.node.args[1])
    freeze(table[0], "vocabulary or position index")
    return [*positions, table[1]]


@rule("topk")
def top(call: Call) -> Result:
    """The greatest entries of an axis are the same in any order of it; only their positions follow it."""
    axes = list(call.first())
    dim = call.arg(2, "dim", -1) % len(axes)
    named, axes[dim] = axes[dim], fresh([call.outputs()[0][dim]], RANK)[0]
    call.choices[call.node, 1] = Choice(named, [atom for axis in axes for atom in axis])
    return axes, axes


@rule("gather")
def gather(call: Call) -> Result:
    axes, index = call.first(), call.axes(call.arg(2, "index"))
    dim = call.arg(1, "dim") % len(axes)
    choice = call.choice(call.arg(2, "index"))
    if choice is None:
        freeze(axes[dim], "gather")
    else:
        unify(axes[dim], choice.axis, "gather")
    own, chosen = call.sizes(call.node.args[0]), call.sizes(call.arg(2, "index"))
    out: Axes = []
    for position, axis in enumerate(axes):
        if position == dim:
            out.append(index[position])
        elif own[position] == chosen[position]:
            unify(axis, index[position], "gather")
            out.append(axis)
        else:
            freeze(axis, "gather")
            out.append(index[position])
    return out


@rule("index")
def indexing(call: Call) -> Result:
    axes, indices = call.first(), call.arg(1, "indices")
    used = [position for position, index in enumerate(indices) if index is not None]
    choice = call.choice(indices[used[0]])
    if choice is not None and used == [0]:
        return _chosen(call, axes, indices[0], choice)
    for position in used:
        freeze(axes[position], "index")
        other = call.choice(indices[position])
        if other is not None:
            freeze(other.axis, "index")
    contiguous = used == list(range(used[0], used[-1] + 1))
    lead = axes[: used[0]] if contiguous else []
    rest = [axis for position, axis in enumerate(axes) if position not in used and position >= len(lead)]
    sizes = call.out_sizes()
    middle = fresh(sizes[len(lead) : len(sizes) - len(rest)], "index")
    return [*lead, *middle, *rest]


def _chosen(call: Call, axes: Axes, index: Node, choice: Choice) -> Axes:
    """The slices at the chosen positions of the first axis: each has inner units of its own."""
    unify(axes[0], choice.axis, "index")
    picked = expand(axes[0])
    # A choice of one leaves no axis behind by which it could be known again.
    known = len(picked) == 1 and any(atom.frozen == RANK for atom in expand(choice.holders))
    inner = [at(axis, picked[0], choice) if known else axis for axis in axes[1:]]
    return [*call.axes(index), *inner]
