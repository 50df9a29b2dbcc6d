"""How a chunk is merged: by compiled loops in host memory, by the method's own function on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modelweld.config.methods import (
    Average,
    Dare,
    Linear,
    MethodParameters,
    ModelStock,
    Mudsc,
    Slerp,
    TaskArithmetic,
    Ties,
)
from modelweld.engine.lane import Lane
from modelweld.methods import linear, model_stock, slerp
from modelweld.methods.dare import dropping
from modelweld.methods.numerics import kernels
from modelweld.methods.numerics.operands import Weights, coefficients
from modelweld.methods.numerics.rng import stream_keys
from modelweld.methods.numerics.ties_thresholds import Survey
from modelweld.methods.registry import TensorContext, method

# The experts' weights (N, n), the base's (n,) or an empty tensor, and where in its tensor the chunk begins, to (n,).
Combine = Callable[[Tensor, Tensor, int], Tensor]


def on_device(parameters: MethodParameters, weights: Weights, context: TensorContext, lane: Lane) -> Combine:
    """The method's own function at the end of a lane; the result is there when its flight has landed.

    Where the device's memory runs out the chunk is merged in smaller blocks, which gives the same.
    """
    chosen = method(parameters.method)

    def launch(stack: Tensor, origin: Tensor, start: int) -> Tensor:
        there = torch.empty(stack.shape, dtype=stack.dtype, device=lane.device)
        for row, values in zip(there, stack, strict=True):
            row.copy_(values, non_blocking=True)
        if origin.numel():
            there -= lane.send(origin)
        return chosen.merge(there, parameters, weights, context=replace(context, offset=start))

    def combine(stack: Tensor, origin: Tensor, start: int) -> Tensor:
        count, done = stack.shape[1], 0
        merged = lane.room(count, dtype=stack.dtype)
        with lane.issuing():
            while done < count:
                stop = min(done + lane.block, count)
                try:
                    part = launch(stack[:, done:stop], origin[done:stop], start + done)
                    merged[done:stop].copy_(part, non_blocking=True)
                except torch.OutOfMemoryError:
                    size = stop - done
                else:
                    done = stop
                    continue
                lane.shrink(size)
        return merged

    return combine


def in_host_memory(
    parameters: MethodParameters,
    weights: Weights,
    context: TensorContext,
    dtype: torch.dtype,
    known: Survey | Tensor | None = None,
) -> Combine:
    """The same arithmetic as `on_device`, compiled.

    `known` is what a method has to be told of the whole tensor: TIES its survey, slerp and model_stock the inner
    products of the models `(N, N)`.
    """
    experts = torch.empty(len(context.experts), dtype=dtype)
    shares = coefficients(weights, experts)
    match parameters:
        case Slerp() if isinstance(known, Tensor):
            into = _weighted(slerp.shares(known, t=parameters.t, weights=weights).to(dtype))
        case ModelStock() if isinstance(known, Tensor):
            into = _weighted(model_stock.shares(known).to(dtype).contiguous())
        case Ties() if isinstance(known, Survey):
            divisor = 0.0 if parameters.disjoint_mean else float(len(experts))
            into = _elected(known, shares, divisor)
        case Dare():
            into = _dropped(parameters, shares, stream_keys(parameters.seed, context.name, context.expert_digests))
        case TaskArithmetic():
            into = _weighted(shares)
        case Linear():
            into = _weighted(linear.normalized(shares, weights) if parameters.normalize else shares)
        case Average() | Mudsc():
            into = _weighted(linear.normalized(torch.ones_like(experts), None))
        case _:
            return on_device(parameters, weights, context, Lane(torch.device("cpu")))
    scale = parameters.scale

    def combine(stack: Tensor, origin: Tensor, start: int) -> Tensor:
        merged = torch.empty_like(stack[0])
        into(stack, origin, start, merged)
        return merged if scale == 1.0 else merged.mul_(scale)

    return combine


Into = Callable[[Tensor, Tensor, int, Tensor], None]


def _weighted(shares: Tensor) -> Into:
    def into(stack: Tensor, origin: Tensor, start: int, merged: Tensor) -> None:
        kernels.weigh(stack.numpy(), origin.numpy(), shares.numpy(), merged.numpy())

    return into


def _elected(known: Survey, shares: Tensor, divisor: float) -> Into:
    exact = known.thresholds.dtype.type

    def into(stack: Tensor, origin: Tensor, start: int, merged: Tensor) -> None:
        values = stack.numpy(), origin.numpy(), known.thresholds, shares.numpy()
        known.count(*kernels.elect(*values, exact(divisor), exact(known.vote), merged.numpy()))

    return into


def _dropped(parameters: Dare, shares: Tensor, keys: Sequence[int]) -> Into:
    level, factor = dropping(parameters.drop_rate, rescale=parameters.rescale)
    streams = torch.tensor(keys, dtype=torch.int64).numpy().view("uint64")
    elected = parameters.combine == "ties"

    def into(stack: Tensor, origin: Tensor, start: int, merged: Tensor) -> None:
        values = stack.numpy(), origin.numpy(), streams
        kernels.drop(*values, start, level, shares.numpy(), elected, merged.numpy())
        merged.mul_(factor)

    return into
