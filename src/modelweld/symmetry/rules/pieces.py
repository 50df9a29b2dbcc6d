"""Pieces of packed axes: queries, keys and values in one projection, each with units of its own."""

from __future__ import annotations

from modelweld.symmetry.atoms import Axes, at, expand, freeze, fresh, view
from modelweld.symmetry.rules.call import Call, Result, rule

PACKED = "packed projection"


@rule("select")
def select(call: Call) -> Result:
    axes, sizes = call.first(), call.sizes(call.node.args[0])
    dim = call.arg(1, "dim") % len(axes)
    return _piece(axes, dim, call.arg(2, "index") % sizes[dim])


@rule("split", "split_with_sizes", "chunk")
def splitting(call: Call) -> Result:
    """Equal pieces of a packed axis are (piece, within): pieces keep their order, each has inner units of its own."""
    axes, sizes, outputs = call.first(), call.sizes(call.node.args[0]), call.outputs()
    dim = call.arg(2, "dim", 0) % len(axes)
    pieces = {output[dim] for output in outputs}
    if len(pieces) == 1 and len(outputs) * outputs[0][dim] == sizes[dim]:
        outer, inner = view([axes[dim]], [len(outputs), outputs[0][dim]])
        apart = [*axes[:dim], outer, inner, *axes[dim + 1 :]]
        return tuple(_piece(apart, dim, position) for position in range(len(outputs)))
    freeze(axes[dim], "unequal split")
    return tuple([*axes[:dim], *fresh([o[dim]], "unequal split"), *axes[dim + 1 :]] for o in outputs)


@rule("unbind")
def unbind(call: Call) -> Result:
    axes = call.first()
    dim = call.arg(1, "dim", 0) % len(axes)
    return tuple(_piece(axes, dim, position) for position in range(len(call.outputs())))


def _piece(axes: Axes, dim: int, position: int) -> Axes:
    """The slice at one position of an axis, which is frozen; if it packs units, each position has units of its own."""
    packs = expand(axes[dim])
    freeze(packs, PACKED)
    rest = [*axes[:dim], *axes[dim + 1 :]]
    # Inputs have positions too, and nothing is packed along them.
    if len(packs) != 1 or packs[0].frozen != PACKED:
        return rest
    return [at(axis, packs[0], position) for axis in rest]
