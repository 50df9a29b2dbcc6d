"""Sign election and disjoint mean (TIES, arXiv 2306.01708, section 3), shared by TIES, DARE, DELLA, KnOTS and DRM.

Per entry: the sign of the sum over the models is elected, entries that disagree are zeroed, each model's are multiplied
by its coefficient, and the sum is divided by the number of entries that are left (at least one), or by N.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from modelweld.methods.numerics.selection import nonzeros, pruned

_BLOCK_BYTES = 1 << 19  # that one round touches of all models together: stays in a core's cache, beside a scratch copy


def elect(
    stack: Tensor,
    coefficients: Tensor | None,
    *,
    thresholds: Tensor | None = None,
    disjoint_mean: bool = True,
    majority: bool = True,
    diagnostics: MutableMapping[str, Any] | None = None,
) -> Tensor:
    """The merged `(*shape)` of `(N, *shape)`; the stack is left as it was.

    `coefficients` `(N,)`, None are ones. With `thresholds` `(N,)` each model's entries of a smaller magnitude count as
    0. Where the models cancel exactly there is no sign to elect: with `majority` such an entry takes the sign that most
    entries of this tensor elected, as TIES does; without it becomes 0. `diagnostics` gets two shares, 0-d and not
    waited for: `kept_share`, of the entries that are kept and not 0, and `sign_conflicts`, of these that are discarded.
    """
    count = stack.shape[0]
    flat = stack.reshape(count, -1)  # (N, L)
    merged = torch.empty_like(flat[0])
    limit = torch.zeros((), dtype=stack.dtype, device=stack.device) if thresholds is None else thresholds.unsqueeze(1)
    ranges = blocks(flat.shape[1], count, stack)
    scratch = torch.empty(count, ranges[0][1] if ranges else 0, dtype=stack.dtype, device=stack.device)
    vote = None
    if majority:
        votes = torch.zeros((), dtype=stack.dtype, device=stack.device)
        for start, stop in ranges:
            votes += summed(pruned(flat[:, start:stop], limit, scratch[:, : stop - start])).sign_().sum()
        vote = votes.sign()
    divisor = None if disjoint_mean else torch.full((), count, dtype=stack.dtype, device=stack.device)
    agreeing = None if diagnostics is None else stack.new_zeros((), dtype=torch.float64)
    left = stack.new_zeros((), dtype=torch.int64)
    for start, stop in ranges:
        kept = pruned(flat[:, start:stop], limit, scratch[:, : stop - start])
        if diagnostics is not None:
            left += nonzeros(kept)
        merged[start:stop] = elect_(kept, coefficients, divisor=divisor, vote=vote, agreeing=agreeing)
    if diagnostics is not None and agreeing is not None:
        diagnostics["kept_share"] = left.double() / max(flat.numel(), 1)
        diagnostics["sign_conflicts"] = (left - agreeing) / left.clamp(min=1)
    return merged.reshape(stack.shape[1:])


def elect_(
    stack: Tensor,
    coefficients: Tensor | None,
    *,
    divisor: Tensor | None = None,
    vote: Tensor | None = None,
    out: Tensor | None = None,
    agreeing: Tensor | None = None,
) -> Tensor:
    """As `elect` (in `out`), on a scratch stack `(N, *shape)` that it overwrites.

    Divides by `divisor` instead of by the entries that are left; entries that cancel take the sign `vote`, or else 0.
    To `agreeing` (0-d) the number of entries that are left, whatever their coefficients, is added.
    """
    sign = summed(stack).sign_()
    if vote is not None:
        sign.addcmul_(1 - sign.abs(), vote)
    stack.mul_(sign).clamp_(min=0)  # magnitudes of those who agree, else 0
    total = weighted_sum(stack, coefficients, out)
    if divisor is None or agreeing is not None:
        voices = None if coefficients is None else (coefficients != 0).to(stack.dtype)
        left = weighted_sum(stack.sign_(), voices)
        if agreeing is not None:
            agreeing += (left if voices is None else stack).sum(dtype=torch.float64)
        divisor = left.clamp_(min=1) if divisor is None else divisor
    return total.div_(divisor).mul_(sign)


def fused(
    stack: Tensor, coefficients: Tensor | None, *, elected: bool, diagnostics: MutableMapping[str, Any] | None
) -> Tensor:
    """`elect` of the pruned `(N, *shape)`, or Σ c_i X_i, for which `diagnostics` gets the `kept_share` alone."""
    if elected:
        return elect(stack, coefficients, diagnostics=diagnostics)
    if diagnostics is not None:
        diagnostics["kept_share"] = nonzeros(stack).double() / max(stack.numel(), 1)
    return weighted_sum(stack, coefficients)


def weighted_sum(stack: Tensor, coefficients: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`(*shape)`: Σ c_i X_i of `(N, *shape)` (in `out`); without coefficients Σ X_i."""
    if coefficients is None:
        return summed(stack, out)
    # Multiply, then add: a fused multiply-add would round the last entries of a chunk unlike the others.
    total = torch.mul(stack[0], coefficients[0], out=out)
    for index in range(1, stack.shape[0]):
        total.add_(stack[index] * coefficients[index])
    return total


def summed(stack: Tensor, out: Tensor | None = None) -> Tensor:
    """`(*shape)`: Σ X_i of `(N, *shape)` (in `out`); much faster than a reduction over the leading dimension."""
    if stack.shape[0] == 1:
        return stack[0].clone() if out is None else out.copy_(stack[0])
    total = torch.add(stack[0], stack[1], out=out)
    for index in range(2, stack.shape[0]):
        total.add_(stack[index])
    return total


def blocks(length: int, count: int, like: Tensor) -> list[tuple[int, int]]:
    """Ranges that cover `length` entries of `count` models: cache-sized on a CPU, one range elsewhere."""
    on_cpu = like.device.type == "cpu"
    step = max(1, _BLOCK_BYTES // like.dtype.itemsize // max(count, 1) if on_cpu else length)
    return [(start, min(start + step, length)) for start in range(0, length, step)]
