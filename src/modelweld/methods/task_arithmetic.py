"""Task arithmetic: the weighted sum of the task vectors (arXiv 2212.04089, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modelweld.methods.linear import factor_coefficients, stacked_factors
from modelweld.methods.numerics.election import weighted_sum
from modelweld.methods.numerics.low_rank import LowRank
from modelweld.methods.numerics.operands import Weights, shares, stacked


def merge(deltas: Tensor, *, weights: Weights | None = None) -> Tensor:
    """`(*shape)`: Σ c_i D_i over `(N, *shape)`, in float32 (float64 for float64)."""
    deltas = stacked(deltas)
    return weighted_sum(deltas, shares(weights, deltas))


def merge_low_rank(factors: Sequence[LowRank], *, weights: Weights | None = None) -> LowRank:
    """Σ c_i B_i A_i as float64 factors of rank Σ R_i."""
    return stacked_factors(factors, factor_coefficients(weights, factors))
