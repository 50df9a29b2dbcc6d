"""The weighted sum of the experts' weights (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.method import Method
from modelweld.methods.numerics.election import weighted_sum
from modelweld.methods.numerics.low_rank import LowRank
from modelweld.methods.numerics.operands import (
    Weights,
    coefficients,
    coefficients_or_none,
    normalized,
    stacked,
)
from modelweld.methods.streaming import Kernel, KernelInputs, weighted_sum_kernel

_OTHERWISE = "set `normalize: false`"


def merge(stack: Tensor, *, weights: Weights | None = None, normalize: bool = True) -> Tensor:
    """`(*shape)`: Σ c_i W_i over `(N, *shape)`, divided by Σ c_i when `normalize`; float32 (float64 for float64).

    Raises MergeError when weights in host memory sum to zero and are to be normalised.
    """
    stack = stacked(stack)
    if not normalize:
        return weighted_sum(stack, coefficients_or_none(weights, stack))
    return weighted_sum(stack, normalized(coefficients(weights, stack), weights, otherwise=_OTHERWISE))


def merge_low_rank(factors: Sequence[LowRank], *, weights: Weights | None = None, normalize: bool = True) -> LowRank:
    """The merged task vector Σ c_i B_i A_i / Σ c_i as float64 factors of rank Σ R_i.

    Raises MergeError without `normalize`: the base would be scaled too, which no low-rank delta can say.
    """
    if not normalize:
        raise MergeError("unnormalised `linear` scales the base", hint="use `task_arithmetic`, or merge densely")
    c = factor_coefficients(weights, factors)
    return stacked_factors(factors, normalized(c, weights, otherwise=_OTHERWISE))


def stacked_factors(factors: Sequence[LowRank], c: Tensor) -> LowRank:
    """Σ c_i B_i A_i as one pair of factors, float64."""
    left = [factor.B.double() * share for factor, share in zip(factors, c, strict=True)]
    return LowRank(torch.cat(left, dim=1), torch.cat([factor.A.double() for factor in factors]))


def factor_coefficients(weights: Weights | None, factors: Sequence[LowRank]) -> Tensor:
    """One float64 coefficient a model, where its factors are."""
    if not factors:
        raise MergeError("no models", hint="give one pair of factors a model")
    return coefficients(weights, torch.empty(len(factors), dtype=torch.float64, device=factors[0].B.device))


def _kernel(parameters: config.Linear, given: KernelInputs) -> Kernel:
    c = given.coefficients
    return weighted_sum_kernel(normalized(c, given.weights, otherwise=_OTHERWISE) if parameters.normalize else c)


METHOD = Method(
    config.Linear,
    merge,
    summary="weighted mean of the weights, or without `normalize` their weighted sum",
    source="2203.05482",
    space="weight",
    shape="elementwise",
    idempotent=lambda parameters: parameters.normalize,
    low_rank=merge_low_rank,
    host_kernel=_kernel,
)
