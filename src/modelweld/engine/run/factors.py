"""LoRA experts in work: their low-rank deltas, merged in the factors, and the factors of an adapter that stays one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modelweld.config.methods import MethodParameters
from modelweld.engine.plan.inputs import Expert
from modelweld.engine.plan.records import TensorPlan
from modelweld.engine.run.diagnostics import combine
from modelweld.engine.run.packing import pack, unpack
from modelweld.errors import ConfigError
from modelweld.methods.method import Method, TensorContext
from modelweld.methods.numerics.low_rank import LowRank
from modelweld.methods.numerics.operands import Weights


def factors_of(name: str, shape: Sequence[int], expert: Expert, read: Callable[[str], Tensor]) -> LowRank | None:
    """An expert's delta of one weight, float64, in the layout of the weight; None when the expert holds it whole.

    `read` brings a stored tensor in float64. An adapter that has left the weight alone gives factors of rank 0.
    """
    if expert.adapter is None:
        return None
    pair = expert.adapter.pairs.get(name)
    if pair is None:
        if name in expert.adapter.touched:
            return None
        return LowRank(torch.zeros(shape[0], 0, dtype=torch.float64), torch.zeros(0, shape[1], dtype=torch.float64))
    return LowRank(*expert.adapter.factors(name, read))


def merge_factors(
    chosen: Method[Any],
    parameters: MethodParameters,
    factors: Sequence[LowRank],
    tensor: TensorPlan,
    weights: Weights,
    context: TensorContext,
) -> LowRank:
    """The merged delta as factors in the layout of the weight; packed projections are merged part by part."""
    upright = [factor.transposed if tensor.transposed else factor for factor in factors]
    if not tensor.packing:
        merged = chosen.merge_low_rank(upright, parameters, weights, context=context)
        return merged.transposed if tensor.transposed else merged
    # Each part's rows of B belong to it alone, so the parts' factors stand side by side without mixing.
    parts: list[list[LowRank]] = [[] for _ in tensor.packing.sizes]
    for factor in upright:
        for part, rows in zip(parts, unpack(factor.B.unsqueeze(0), tensor.packing), strict=True):
            part.append(LowRank(rows[0], factor.A))
    done, diagnostics = [], []
    for number, part in enumerate(parts):
        own = dataclasses.replace(context, name=f"{context.name}[{number}]", diagnostics={})
        done.append(chosen.merge_low_rank(part, parameters, weights, context=own))
        diagnostics.append((tensor.packing.sizes[number], own.diagnostics))
    context.diagnostics.update(combine(diagnostics))
    width, left, before = sum(factor.rank for factor in done), [], 0
    for factor in done:
        padded = torch.zeros(factor.B.shape[0], width, dtype=factor.B.dtype, device=factor.B.device)
        padded[:, before : before + factor.rank] = factor.B
        left.append(padded)
        before += factor.rank
    merged = LowRank(pack(left, tensor.packing), torch.cat([factor.A for factor in done]))
    return merged.transposed if tensor.transposed else merged


def stored_factor(merged: LowRank, tensor: TensorPlan) -> Tensor:
    """The factor that is to be written, padded with zeros to the rank that the plan gave it."""
    if tensor.whole is None or tensor.factor is None:
        raise ConfigError(f"{tensor.name} is no factor of a weight")
    # PEFT's B @ A is (out, in) for a linear layer, whatever its storage, and the transpose of an embedding's weight.
    oriented = merged.transposed if tensor.flipped else merged
    factor = oriented.A if tensor.factor == "A" else oriented.B
    padded = torch.zeros(tensor.shape, dtype=factor.dtype)
    padded[: factor.shape[0], : factor.shape[1]] = factor
    return padded
