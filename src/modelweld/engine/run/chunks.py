"""How a chunk is merged: by compiled loops in host memory, by the method's own function on an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from modelweld.config.methods import MethodParameters
from modelweld.engine.run.device_stream import DeviceStream
from modelweld.methods.method import TensorContext
from modelweld.methods.numerics.operands import Weights, coefficients
from modelweld.methods.registry import method
from modelweld.methods.streaming import KernelInputs, TensorStatistics

# The experts' weights (N, n), the base's (n,) or an empty tensor, and where in its tensor the chunk begins, to (n,).
Combine = Callable[[Tensor, Tensor, int], Tensor]


def on_device(parameters: MethodParameters, weights: Weights, context: TensorContext, stream: DeviceStream) -> Combine:
    """The method's own function on the stream's device; the result is valid after `synchronize`.

    Where the device's memory runs out the chunk is merged in smaller blocks, which gives the same.
    """
    chosen = method(parameters.method)

    def launch(stack: Tensor, origin: Tensor, start: int) -> Tensor:
        there = torch.empty(stack.shape, dtype=stack.dtype, device=stream.device)
        for row, values in zip(there, stack, strict=True):
            row.copy_(values, non_blocking=True)
        if origin.numel():
            there -= stream.to_device(origin)
        return chosen.merge(there, parameters, weights, context=replace(context, offset=start))

    def combine(stack: Tensor, origin: Tensor, start: int) -> Tensor:
        count, done = stack.shape[1], 0
        merged = stream.pinned_empty(count, dtype=stack.dtype)
        with stream.submit():
            while done < count:
                stop = min(done + stream.block, count)
                try:
                    part = launch(stack[:, done:stop], origin[done:stop], start + done)
                    merged[done:stop].copy_(part, non_blocking=True)
                except torch.OutOfMemoryError:
                    size = stop - done
                else:
                    done = stop
                    continue
                stream.halve_block(size)
        return merged

    return combine


def in_host_memory(
    parameters: MethodParameters,
    weights: Weights,
    context: TensorContext,
    dtype: torch.dtype,
    statistics: TensorStatistics | None = None,
) -> Combine:
    """The same arithmetic as `on_device` in the method's compiled form, where it has one.

    `statistics` is what the method's statistics pass has found of the whole tensor.
    """
    chosen = method(parameters.method)
    if chosen.host_kernel is None:
        return on_device(parameters, weights, context, DeviceStream(torch.device("cpu")))
    shares = coefficients(weights, torch.empty(len(context.experts), dtype=dtype))
    given = KernelInputs(weights, shares, context.name, context.expert_digests, statistics)
    kernel, scale = chosen.host_kernel(parameters, given), parameters.scale

    def combine(stack: Tensor, origin: Tensor, start: int) -> Tensor:
        merged = torch.empty_like(stack[0])
        kernel(stack.numpy(), origin.numpy(), start, merged.numpy())
        return merged if scale == 1.0 else merged.mul_(scale)

    return combine
