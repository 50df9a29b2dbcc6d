"""Operations that move, cut, join and repeat axes."""

from __future__ import annotations

from collections.abc import Sequence

from modelweld.symmetry.atoms import Axes, freeze, fresh, unify, view
from modelweld.symmetry.rules.call import Call, Result, rule, unknown


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def reshape(call: Call) -> Result:
    return view(call.first(), call.out_sizes())


@rule("permute")
def permute(call: Call) -> Result:
    axes = call.first()
    return [axes[dim] for dim in call.arg(1, "dims")]


@rule("transpose", "t", "numpy_T")
def transpose(call: Call) -> Result:
    axes = list(call.first())
    one, two = (call.arg(1, "dim0"), call.arg(2, "dim1")) if call.name == "transpose" else (0, len(axes) - 1)
    axes[one], axes[two] = axes[two], axes[one]
    return axes


@rule("unsqueeze")
def unsqueeze(call: Call) -> Result:
    axes = call.first()
    at = call.arg(1, "dim") % (len(axes) + 1)
    return [*axes[:at], [], *axes[at:]]


@rule("squeeze")
def squeeze(call: Call) -> Result:
    axes, sizes = call.first(), call.sizes(call.node.args[0])
    dims = call.arg(1, "dim")
    chosen = range(len(sizes)) if dims is None else [dims] if isinstance(dims, int) else dims
    removed = {dim % len(sizes) for dim in chosen}
    return [axis for dim, axis in enumerate(axes) if not (dim in removed and sizes[dim] == 1)]


@rule("expand", "repeat")
def expand_or_repeat(call: Call) -> Result:
    """Copies: a stretched axis is a new, free one, since all its positions hold the same."""
    own, sizes = call.sizes(call.node.args[0]), call.out_sizes()
    pad = len(sizes) - len(own)
    axes: Axes = [*([[]] * pad), *call.first()]
    own = [1] * pad + own
    out: Axes = []
    for axis, before, after in zip(axes, own, sizes, strict=True):
        if before == after:
            out.append(axis)
        elif before == 1:
            out += fresh([after])
        else:
            out.append([*fresh([after // before])[0], *axis])
    return out


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Result:
    axes, dim, times = list(call.first()), call.arg(2, "dim"), call.arg(1, "repeats")
    if not isinstance(times, int) or dim is None:
        return unknown(call)
    axes[dim] = [*axes[dim], *fresh([times])[0]]
    return axes


@rule("slice")
def slicing(call: Call) -> Result:
    return _resized(call, "slice")


@rule("constant_pad_nd", "pad")
def padding(call: Call) -> Result:
    return _resized(call, "pad")


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "max_pool2d", "avg_pool2d", "max_pool1d", "avg_pool1d")
def pooling(call: Call) -> Result:
    kept = [*call.first()[:2], *fresh(call.out_sizes()[2:], "spatial position")]
    return (kept, kept) if isinstance(call.node.meta["val"], (tuple, list)) else kept


def _resized(call: Call, why: str) -> Axes:
    """Axes whose length stays are kept; where it changes, positions are named, which pins both sides."""
    own, sizes = call.sizes(call.node.args[0]), call.out_sizes()
    out: Axes = []
    for axis, before, after in zip(call.first(), own, sizes, strict=True):
        if before == after:
            out.append(axis)
        else:
            freeze(axis, why)
            out += fresh([after], why)
    return out


@rule("cat")
def concatenate(call: Call) -> Result:
    dim = call.arg(1, "dim", 0) % len(call.out_sizes())
    return _join(call, dim, [call.axes(node) for node in call.arg(0, "tensors")], "cat")


@rule("stack")
def stack(call: Call) -> Result:
    dim = call.arg(1, "dim", 0) % len(call.out_sizes())
    widened = []
    for node in call.arg(0, "tensors"):
        axes = call.axes(node)
        widened.append([*axes[:dim], [], *axes[dim:]])
    return _join(call, dim, widened, "stack")


def _join(call: Call, dim: int, parts: Sequence[Axes], why: str) -> Axes:
    first = list(parts[0])
    for axes in parts:
        for position, axis in enumerate(axes):
            if position == dim:
                freeze(axis, why)
            elif axis is not first[position]:
                unify(first[position], axis, why)
    first[dim] = fresh([call.out_sizes()[dim]], why)[0]
    return first
