"""Task arithmetic: the weighted sum of the task vectors (arXiv 2212.04089, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modelweld.config import methods as config
from modelweld.methods.linear import factor_coefficients, stacked_factors
from modelweld.methods.method import Method
from modelweld.methods.numerics.election import weighted_sum
from modelweld.methods.numerics.low_rank import LowRank
from modelweld.methods.numerics.operands import (
    Weights,
    coefficients_or_none,
    stacked,
)
from modelweld.methods.streaming import Kernel, KernelInputs, weighted_sum_kernel


def merge(deltas: Tensor, *, weights: Weights | None = None) -> Tensor:
    """`(*shape)`: Σ c_i D_i over `(N, *shape)`, in float32 (float64 for float64)."""
    deltas = stacked(deltas)
    return weighted_sum(deltas, coefficients_or_none(weights, deltas))


def merge_low_rank(factors: Sequence[LowRank], *, weights: Weights | None = None) -> LowRank:
    """Σ c_i B_i A_i as float64 factors of rank Σ R_i."""
    return stacked_factors(factors, factor_coefficients(weights, factors))


def _kernel(parameters: config.TaskArithmetic, given: KernelInputs) -> Kernel:
    return weighted_sum_kernel(given.coefficients)


METHOD = Method(
    config.TaskArithmetic,
    merge,
    summary="base plus the weighted sum of the task vectors",
    source="2212.04089",
    shape="elementwise",
    low_rank=merge_low_rank,
    host_kernel=_kernel,
)
