"""What each ATen operation does to axes: one short function an operation, listed in a table by name.

A rule gets a `Call` and returns the axes of the result (a tuple of them for operations with several results). It says
which axes the operation makes one (`unify`), which it keeps, and which it pins (`freeze`). An operation that is not in
the table pins everything it touches: less alignment, never a wrong one.

Numbers that name positions (the experts that a router chose) are no ordinary numbers: they follow the axis that they
name. `top` makes them, the operations of CARRIES hand them on, those of CHOOSES pick by them, and any other pins the
axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from modelweld.symmetry.atoms import Axes, Axis, UnsupportedOp, at, expand, freeze, fresh, length, unify, view

Result = Axes | tuple[Axes, ...]
Rule = Callable[["Call"], Result]


PACKED, RANK = "packed projection", "rank"


@dataclass(frozen=True, eq=False)
class Choice:
    """Positions on an axis, chosen from its values: wherever all atoms of `holders` are, one of them was picked."""

    axis: Axis
    holders: Axis


@dataclass(frozen=True)
class Call:
    """One operation of the graph: its name, its arguments, and the axes of the tensors among them.

    `choices` holds, by node and number of its result, what the numbers in a tensor name; `sums` the axes of what is
    summed up on the way and never seen as a tensor.
    """

    name: str
    node: Node
    env: dict[Node, Result]
    reads: list[tuple[Node, int]]
    choices: dict[tuple[Node, int], Choice]
    sums: list[Axes]

    @property
    def tensors(self) -> list[Node]:
        return [node for node in self.node.all_input_nodes if node in self.env]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def axes(self, node: Any) -> Axes:
        found = self.env[node]
        if isinstance(found, tuple):
            raise UnsupportedOp("a tuple where a tensor was expected")
        return found

    def contracts(self, weight: Any, dim: int) -> None:
        """Note that this axis of an operand takes units in, also where the operand was picked from a stack."""
        while isinstance(weight, Node) and weight.op == "call_function" and name_of(weight) == "index":
            weight, picks = weight.args[0], weight.args[1]
            dim -= sum(len(self.sizes(index)) - 1 for index in picks if isinstance(index, Node))
        if isinstance(weight, Node):
            self.reads.append((weight, dim))

    def choice(self, node: Any) -> Choice | None:
        """What the numbers of a tensor name, if they name anything."""
        return self.choices.get((node, 0)) if isinstance(node, Node) else None

    def first(self) -> Axes:
        return self.axes(self.node.args[0])

    def sizes(self, node: Any) -> list[int]:
        return [int(size) for size in node.meta["val"].shape]

    def out_sizes(self) -> list[int]:
        return self.sizes(self.node)

    def outputs(self) -> list[list[int]]:
        value = self.node.meta["val"]
        return [[int(size) for size in item.shape] for item in value]


def name_of(node: Node) -> str:
    """The operation's name without its namespace and without the mark of what works in place."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("_") else name.rstrip("_")


def unknown(call: Call) -> Result:
    """Pin all that a call touches."""
    why = f"unknown operation {call.name}"
    for node in call.tensors:
        found = call.env[node]
        for axes in found if isinstance(found, tuple) else (found,):
            for axis in axes:
                freeze(axis, why)
    value = call.node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return tuple(fresh([int(s) for s in item.shape], why) for item in value if isinstance(item, torch.Tensor))
    return fresh(call.out_sizes(), why)


def keep(call: Call) -> Result:
    return call.first()


def keep_twice(call: Call) -> Result:
    return call.first(), call.first()


def uniform(call: Call) -> Result:
    # Every entry is the same: no position differs from another, so nothing is tied down.
    return fresh(call.out_sizes())


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


def ordered(call: Call) -> Result:
    axes, why = list(call.first()), f"{call.name} depends on the order"
    dims = range(len(axes)) if call.name == "roll" else call.arg(1, "dims" if call.name == "flip" else "dim")
    for dim in [dims] if isinstance(dims, int) else dims:
        freeze(axes[dim], why)
        # A position of the result is no longer that position of the input.
        axes[dim] = fresh([length(axes[dim])], why)[0]
    return axes


def softmax(call: Call) -> Result:
    axes = call.first()
    dim = call.arg(1, "dim") % len(axes)
    call.sums.append([*axes[:dim], *axes[dim + 1 :]])
    return axes


def top(call: Call) -> Result:
    """The greatest entries of an axis are the same in any order of it; only their positions follow it."""
    axes = list(call.first())
    dim = call.arg(2, "dim", -1) % len(axes)
    named, axes[dim] = axes[dim], fresh([call.outputs()[0][dim]], RANK)[0]
    call.choices[call.node, 1] = Choice(named, [atom for axis in axes for atom in axis])
    return axes, axes


def layer_norm(call: Call) -> Result:
    axes = call.first()
    trailing = len(call.arg(1, "normalized_shape"))
    call.sums.append(list(axes[:-trailing]))
    for node in call.tensors[1:]:
        for back in range(1, trailing + 1):
            unify(axes[-back], call.axes(node)[-back], call.name)
    return axes


def group_norm(call: Call) -> Result:
    axes = call.first()
    groups = call.arg(1, "num_groups")
    view([axes[1]], [groups, length(axes[1]) // groups])
    for node in call.tensors[1:]:
        unify(axes[1], call.axes(node)[0], call.name)
    return axes


def batch_norm(call: Call) -> Result:
    axes = call.first()
    for node in call.tensors[1:]:
        unify(axes[1], call.axes(node)[0], call.name)
    return axes


def linear(call: Call) -> Result:
    axes, weight = call.first(), call.axes(call.arg(1, "weight"))
    unify(axes[-1], weight[1], call.name)
    call.contracts(call.arg(1, "weight"), 1)
    bias = call.arg(2, "bias")
    if bias is not None:
        unify(weight[0], call.axes(bias)[0], call.name)
    return [*axes[:-1], weight[0]]


def addmm(call: Call) -> Result:
    bias, left, right = (call.axes(call.node.args[i]) for i in range(3))
    unify(left[-1], right[0], call.name)
    call.contracts(call.node.args[2], 0)
    unify(bias[-1], right[1], call.name)
    return [left[0], right[1]]


def matmul(call: Call) -> Result:
    shift = 1 if call.name == "baddbmm" else 0
    left, right = call.axes(call.node.args[shift]), call.axes(call.node.args[shift + 1])
    if len(left) == 1 or len(right) == 1:
        unify(left[-1], right[-2] if len(right) > 1 else right[0], call.name)
        return left[:-1] if len(right) == 1 else right[:-2] + right[-1:]
    unify(left[-1], right[-2], call.name)
    call.contracts(call.node.args[shift], len(left) - 1)
    call.contracts(call.node.args[shift + 1], len(right) - 2)
    batch: Axes = []
    for back in range(len(call.out_sizes()) - 2, 0, -1):
        meeting = [axes[-2 - back] for axes in (left, right) if len(axes) >= 2 + back and expand(axes[-2 - back])]
        if len(meeting) == 2:
            unify(meeting[0], meeting[1], call.name)
        batch.append(meeting[0] if meeting else [])
    return [*batch, left[-2], right[-1]]


def convolution(call: Call) -> Result:
    axes, weight = call.first(), call.axes(call.arg(1, "weight"))
    groups = call.arg(8, "groups", 1) if call.name == "convolution" else call.arg(6, "groups", 1)
    if groups == 1:
        unify(axes[1], weight[1], call.name)
        call.contracts(call.arg(1, "weight"), 1)
    elif length(axes[1]) == length(weight[0]) == groups:
        unify(axes[1], weight[0], call.name)
    else:
        freeze(axes[1], "grouped convolution")
        freeze(weight[0], "grouped convolution")
    for kernel in weight[2:]:
        freeze(kernel, "kernel position")
    bias = call.arg(2, "bias")
    if bias is not None:
        unify(weight[0], call.axes(bias)[0], call.name)
    return [axes[0], weight[0], *fresh(call.out_sizes()[2:], "spatial position")]


def attention(call: Call) -> Result:
    """Scaled dot-product attention; with fewer key than query heads, queries are (kv head, query within it)."""
    query, key, value = (call.axes(call.node.args[i]) for i in range(3))
    unify(query[-1], key[-1], call.name)
    unify(key[1], value[1], call.name)
    unify(key[-2], value[-2], call.name)
    q_heads, kv_heads = call.sizes(call.node.args[0])[1], call.sizes(call.node.args[1])[1]
    if q_heads == kv_heads:
        unify(query[1], key[1], call.name)
    else:
        outer, _ = view([query[1]], [kv_heads, q_heads // kv_heads])
        unify(outer, key[1], call.name)
    mask = call.arg(3, "attn_mask")
    if mask is not None:
        sizes = call.sizes(mask)
        if len(sizes) == 4 and sizes[1] != 1:
            unify(query[1], call.axes(mask)[1], call.name)
    return [query[0], query[1], query[2], value[-1]]


def embedding(call: Call) -> Result:
    table, positions = call.axes(call.node.args[0]), call.axes(call.node.args[1])
    freeze(table[0], "vocabulary or position index")
    return [*positions, table[1]]


def reshape(call: Call) -> Result:
    return view(call.first(), call.out_sizes())


def permute(call: Call) -> Result:
    axes = call.first()
    return [axes[dim] for dim in call.arg(1, "dims")]


def transpose(call: Call) -> Result:
    axes = list(call.first())
    one, two = (call.arg(1, "dim0"), call.arg(2, "dim1")) if call.name == "transpose" else (0, len(axes) - 1)
    axes[one], axes[two] = axes[two], axes[one]
    return axes


def unsqueeze(call: Call) -> Result:
    axes = call.first()
    at = call.arg(1, "dim") % (len(axes) + 1)
    return [*axes[:at], [], *axes[at:]]


def squeeze(call: Call) -> Result:
    axes, sizes = call.first(), call.sizes(call.node.args[0])
    dims = call.arg(1, "dim")
    chosen = range(len(sizes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(sizes) for dim in chosen}
    return [axis for dim, axis in enumerate(axes) if not (dim in gone and sizes[dim] == 1)]


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


def repeat_interleave(call: Call) -> Result:
    axes, dim, times = list(call.first()), call.arg(2, "dim"), call.arg(1, "repeats")
    if not isinstance(times, int) or dim is None:
        return unknown(call)
    axes[dim] = [*axes[dim], *fresh([times])[0]]
    return axes


def slicing(call: Call) -> Result:
    return _resized(call, "slice")


def select(call: Call) -> Result:
    axes, sizes = call.first(), call.sizes(call.node.args[0])
    dim = call.arg(1, "dim") % len(axes)
    return _piece(axes, dim, call.arg(2, "index") % sizes[dim])


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


def concatenate(call: Call) -> Result:
    dim = call.arg(1, "dim", 0) % len(call.out_sizes())
    return _join(call, dim, [call.axes(node) for node in call.arg(0, "tensors")], "cat")


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


def pooling(call: Call) -> Result:
    kept = [*call.first()[:2], *fresh(call.out_sizes()[2:], "spatial position")]
    return (kept, kept) if isinstance(call.node.meta["val"], (tuple, list)) else kept


def padding(call: Call) -> Result:
    return _resized(call, "pad")


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


# Operations that only move numbers about: positions stay what they are.
CARRIES = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t"}
) | frozenset(
    {"unsqueeze", "squeeze", "clone", "_to_copy", "alias", "detach", "to", "contiguous", "expand", "lift_fresh_copy"}
)
# Operations whose rules look up what an index names.
CHOOSES = frozenset({"index", "gather"})


def _table(*entries: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in entries for name in names.split()}


# Every position holds the same value, whatever the arguments hold.
UNIFORM = frozenset({"zeros", "ones", "full", "scalar_tensor", "zeros_like", "ones_like", "full_like"}) | frozenset(
    {"new_ones", "new_zeros", "new_full", "empty_like", "fill"}
)

RULES: dict[str, Rule] = _table(
    (keep, "relu gelu silu sigmoid tanh exp rsqrt sqrt neg abs clone _to_copy alias detach cos sin log reciprocal"),
    (keep, "bitwise_not logical_not dropout ceil floor sign clamp contiguous erf log2 type_as to lift_fresh_copy"),
    (keep, "leaky_relu softplus hardtanh hardswish isinf isnan clamp_min clamp_max round trunc square elu mish relu6"),
    (keep, "feature_dropout"),
    (softmax, "softmax _softmax log_softmax _log_softmax _safe_softmax"),
    (keep_twice, "native_dropout"),
    (uniform, " ".join(sorted(UNIFORM))),
    (elementwise, "add sub mul div where gt lt ge le eq ne maximum minimum pow bitwise_and logical_and logical_or"),
    (elementwise, "bitwise_or masked_fill rsub remainder floor_divide copy __and__ __or__ bitwise_xor"),
    (reduction, "mean sum amax amin var std any all argmax argmin max min norm linalg_vector_norm"),
    (ordered, "cumsum cumprod flip roll"),
    (top, "topk"),
    (layer_norm, "layer_norm rms_norm"),
    (group_norm, "group_norm"),
    (batch_norm, "batch_norm"),
    (linear, "linear"),
    (addmm, "addmm"),
    (matmul, "mm bmm matmul baddbmm"),
    (convolution, "convolution conv1d conv2d conv3d"),
    (attention, "scaled_dot_product_attention"),
    (embedding, "embedding"),
    (reshape, "view reshape _unsafe_view flatten unflatten"),
    (permute, "permute"),
    (transpose, "transpose t numpy_T"),
    (unsqueeze, "unsqueeze"),
    (squeeze, "squeeze"),
    (expand_or_repeat, "expand repeat"),
    (repeat_interleave, "repeat_interleave"),
    (slicing, "slice"),
    (select, "select"),
    (splitting, "split split_with_sizes chunk"),
    (unbind, "unbind"),
    (concatenate, "cat"),
    (stack, "stack"),
    (gather, "gather"),
    (indexing, "index"),
    (pooling, "adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d avg_pool2d max_pool1d avg_pool1d"),
    (padding, "constant_pad_nd pad"),
)
