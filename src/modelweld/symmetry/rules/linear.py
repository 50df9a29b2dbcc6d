"""Products that contract axes (linear layers, convolutions, attention), and norms."""

from __future__ import annotations

from modelweld.symmetry.atoms import Axes, expand, freeze, fresh, length, unify, view
from modelweld.symmetry.rules.call import Call, Result, rule


@rule("linear")
def linear(call: Call) -> Result:
    axes, weight = call.first(), call.axes(call.arg(1, "weight"))
    unify(axes[-1], weight[1], call.name)
    call.contracts(call.arg(1, "weight"), 1)
    bias = call.arg(2, "bias")
    if bias is not None:
        unify(weight[0], call.axes(bias)[0], call.name)
    return [*axes[:-1], weight[0]]


@rule("addmm")
def addmm(call: Call) -> Result:
    bias, left, right = (call.axes(call.node.args[i]) for i in range(3))
    unify(left[-1], right[0], call.name)
    call.contracts(call.node.args[2], 0)
    unify(bias[-1], right[1], call.name)
    return [left[0], right[1]]


@rule("mm", "bmm", "matmul", "baddbmm")
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


@rule("convolution", "conv1d", "conv2d", "conv3d")
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


@rule("scaled_dot_product_attention")
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


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Result:
    axes = call.first()
    trailing = len(call.arg(1, "normalized_shape"))
    call.sums.append(list(axes[:-trailing]))
    for node in call.tensors[1:]:
        for back in range(1, trailing + 1):
            unify(axes[-back], call.axes(node)[-back], call.name)
    return axes


@rule("group_norm")
def group_norm(call: Call) -> Result:
    axes = call.first()
    groups = call.arg(1, "num_groups")
    view([axes[1]], [groups, length(axes[1]) // groups])
    for node in call.tensors[1:]:
        unify(axes[1], call.axes(node)[0], call.name)
    return axes


@rule("batch_norm")
def batch_norm(call: Call) -> Result:
    axes = call.first()
    for node in call.tensors[1:]:
        unify(axes[1], call.axes(node)[0], call.name)
    return axes
