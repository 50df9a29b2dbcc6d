"""Operations on every entry by itself, and reductions along axes."""

from __future__ import annotations

from torch.fx import Node

from modelweld.symmetry.atoms import Axis, freeze, fresh, length, unify
from modelweld.symmetry.rules.call import Call, Result, rule

ACTIVATIONS = [
    "relu",
    "gelu",
    "silu",
    "sigmoid",
    "tanh",
    "leaky_relu",
    "softplus",
    "hardtanh",
    "hardswish",
    "elu",
    "mish",
    "relu6",
    "dropout",
    "feature_dropout",
]
UNARY = [
    "exp",
    "rsqrt",
    "sqrt",
    "neg",
    "abs",
    "cos",
    "sin",
    "log",
    "log2",
    "reciprocal",
    "ceil",
    "floor",
    "round",
    "trunc",
    "sign",
    "square",
    "erf",
    "clamp",
    "clamp_min",
    "clamp_max",
    "isinf",
    "isnan",
    "bitwise_not",
    "logical_not",
]
COPIES = ["clone", "_to_copy", "alias", "detach", "contiguous", "type_as", "to", "lift_fresh_copy"]
BINARY = [
    "add",
    "sub",
    "mul",
    "div",
    "rsub",
    "remainder",
    "floor_divide",
    "pow",
    "maximum",
    "minimum",
    "where",
    "masked_fill",
    "copy",
    "gt",
    "lt",
    "ge",
    "le",
    "eq",
    "ne",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "logical_and",
    "logical_or",
    "__and__",
    "__or__",
]
REDUCTIONS = [
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "any",
    "all",
    "argmax",
    "argmin",
    "max",
    "min",
    "norm",
    "linalg_vector_norm",
]
# Every position holds the same value, whatever the arguments hold.
UNIFORM = frozenset({"zeros", "ones", "full", "scalar_tensor", "zeros_like", "ones_like", "full_like"}) | frozenset(
    {"new_ones", "new_zeros", "new_full", "empty_like", "fill"}
)


@rule(*ACTIVATIONS, *UNARY, *COPIES)
def keep(call: Call) -> Result:
    return call.first()


@rule("native_dropout")
def keep_twice(call: Call) -> Result:
    return call.first(), call.first()


@rule(*sorted(UNIFORM))
def uniform(call: Call) -> Result:
    # Every entry is the same: no position differs from another, so nothing is tied down.
    return fresh(call.out_sizes())


@rule(*BINARY)
def elementwise(call: Call) -> Result:
    """Broadcast: axes that meet are one; an axis of length one is stretched and constrains nothing."""
    sizes = call.out_sizes()
    result: list[Axis | None] = [None] * len(sizes)
    for node in call.tensors:
        axes, own = call.axes(node), call.sizes(node)
        pad = len(sizes) - len(own)
        for position, axis in enumerate(axes):
            if own[position] == 1:
                continue
            here = result[pad + position]
            if here is None:
                result[pad + position] = list(axis)
            else:
                unify(here, axis, call.name)
    return [axis if axis is not None else fresh([size])[0] for axis, size in zip(result, sizes, strict=True)]


@rule(*REDUCTIONS)
def reduction(call: Call) -> Result:
    axes = call.first()
    dims = call.arg(1, "dim")
    if isinstance(dims, Node):
        # min(a, b) of two tensors
        return elementwise(call)
    chosen = range(len(axes)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {dim % len(axes) for dim in chosen} if axes else set()
    if call.name in {"argmax", "argmin", "max", "min"} and reduced:
        for dim in reduced:
            freeze(axes[dim], f"{call.name} names a position")
    kept = len(call.out_sizes()) == len(axes) if not isinstance(call.node.meta["val"], (tuple, list)) else False
    out = [[] if dim in reduced else axis for dim, axis in enumerate(axes) if kept or dim not in reduced]
    return (out, out) if isinstance(call.node.meta["val"], (tuple, list)) else out


@rule("cumsum", "cumprod", "flip", "roll")
def ordered(call: Call) -> Result:
    axes, why = list(call.first()), f"{call.name} depends on the order"
    dims = range(len(axes)) if call.name == "roll" else call.arg(1, "dims" if call.name == "flip" else "dim")
    for dim in [dims] if isinstance(dims, int) else dims:
        freeze(axes[dim], why)
        # A position of the result is no longer that position of the input.
        axes[dim] = fresh([length(axes[dim])], why)[0]
    return axes


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(call: Call) -> Result:
    axes = call.first()
    dim = call.arg(1, "dim") % len(axes)
    call.sums.append([*axes[:dim], *axes[dim + 1 :]])
    return axes
