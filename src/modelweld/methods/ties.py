"""TIES: trim, elect sign, disjoint mean (arXiv 2306.01708, algorithm 1)."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.methods.method import Method
from modelweld.methods.numerics import kernels
from modelweld.methods.numerics.election import elect
from modelweld.methods.numerics.kernels import Floats
from modelweld.methods.numerics.operands import (
    Weights,
    coefficients_or_none,
    require_finite,
    stacked,
)
from modelweld.methods.numerics.selection import magnitude_threshold
from modelweld.methods.numerics.ties_thresholds import TiesStatistics, ties_statistics
from modelweld.methods.streaming import Chunks, Kernel, KernelInputs, StatisticsPass


def merge(
    deltas: Tensor,
    *,
    density: float = 0.2,
    weights: Weights | None = None,
    thresholds: Tensor | None = None,
    disjoint_mean: bool = True,
    diagnostics: MutableMapping[str, Any] | None = None,
) -> Tensor:
    """`(*shape)`: the elected, disjoint mean of `(N, *shape)` trimmed to `density`; float32 (float64 for float64).

    Each model is trimmed by its own threshold over this tensor, or by `thresholds` `(N,)` when they were taken over
    more than one tensor. Without `disjoint_mean` the sum is divided by N. Weights multiply after the election: they
    scale contributions and do not affect the signs. `diagnostics` are those of `elect`.
    """
    deltas = stacked(deltas)
    if thresholds is None:
        require_finite(deltas)
        thresholds = trim_thresholds(deltas, density)
    c = coefficients_or_none(weights, deltas)
    return elect(deltas, c, thresholds=thresholds, disjoint_mean=disjoint_mean, diagnostics=diagnostics)


def trim_thresholds(deltas: Tensor, density: float) -> Tensor:
    """`(N,)`: the magnitude from which on each model's entries belong to its largest `density`."""
    return torch.stack([magnitude_threshold(delta, density) for delta in deltas])


def _collect(parameters: config.Ties, chunks: Chunks) -> TiesStatistics:
    return ties_statistics(chunks.passes, chunks.sample(), chunks.elements, parameters.density)


def _kernel(parameters: config.Ties, given: KernelInputs) -> Kernel:
    known: TiesStatistics = given.statistics
    c, exact = given.coefficients.numpy(), known.thresholds.dtype.type
    divisor = exact(0 if parameters.disjoint_mean else len(c))

    def kernel(stack: Floats, origin: Floats, start: int, merged: Floats) -> None:
        known.count(*kernels.elect(stack, origin, known.thresholds, c, divisor, exact(known.vote), merged))

    return kernel


METHOD = Method(
    config.Ties,
    merge,
    summary="trim, elect signs, mean of those who agree",
    source="2306.01708",
    # Between the two passes the entries near the models' thresholds are held.
    statistics=StatisticsPass(_collect, held_share=0.03),
    host_kernel=_kernel,
)
