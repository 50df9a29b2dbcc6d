"""Packed and transposed weights, merged by meaning: part by part, as (out, in) matrices, whatever the storage."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from modelweld.config.methods import MethodParameters
from modelweld.engine.plan.records import Packing, TensorPlan
from modelweld.engine.run.diagnostics import combine
from modelweld.methods.method import Method, TensorContext
from modelweld.methods.numerics.operands import Weights


def merge_packed(
    chosen: Method[Any],
    parameters: MethodParameters,
    stack: Tensor,
    tensor: TensorPlan,
    weights: Weights,
    context: TensorContext,
) -> Tensor:
    """`(*shape)`: the method over `(N, *shape)`; each projection of a packed weight is merged by itself."""
    if not (tensor.transposed or tensor.packing):
        return chosen.merge(stack, parameters, weights, context=context)
    upright = stack.mT if tensor.transposed else stack  # (N, out, in)
    parts = unpack(upright, tensor.packing) if tensor.packing else [upright]
    merged, diagnostics = [], []
    for number, part in enumerate(parts):
        name = f"{context.name}[{number}]" if tensor.packing else context.name
        own = dataclasses.replace(context, name=name, diagnostics={})
        merged.append(chosen.merge(part.contiguous(), parameters, weights, context=own))
        diagnostics.append((part[0].numel(), own.diagnostics))
    context.diagnostics.update(combine(diagnostics))
    whole = pack(merged, tensor.packing) if tensor.packing else merged[0]  # (out, in)
    return (whole.mT if tensor.transposed else whole).contiguous()


def unpack(stack: Tensor, packing: Packing) -> list[Tensor]:
    """The projections `(N, rows_j, in)` of a packed stack `(N, out, in)`."""
    count, _, columns = stack.shape
    grouped = stack.reshape(count, packing.groups, sum(packing.sizes), columns)
    return [part.reshape(count, -1, columns) for part in torch.split(grouped, list(packing.sizes), dim=2)]


def pack(parts: list[Tensor], packing: Packing) -> Tensor:
    """The inverse of `unpack` for one model: `(out, in)` of the projections `(rows_j, in)`."""
    columns = parts[0].shape[-1]
    grouped = [part.reshape(packing.groups, size, columns) for part, size in zip(parts, packing.sizes, strict=True)]
    return torch.cat(grouped, dim=1).reshape(-1, columns)
