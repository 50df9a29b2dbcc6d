"""The plain mean of the experts' weights (model soups, arXiv 2203.05482, uniform soup)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.methods import linear
from modelweld.methods.method import Method
from modelweld.methods.numerics.low_rank import LowRank
from modelweld.methods.streaming import Kernel, KernelInputs, weighted_sum_kernel


def merge(stack: Tensor) -> Tensor:
    """`(*shape)`: the mean over the models of `(N, *shape)`, in float32 (float64 for float64)."""
    return linear.merge(stack, normalize=True)


def merge_low_rank(factors: Sequence[LowRank]) -> LowRank:
    """The mean of the task vectors as float64 factors of rank Σ R_i."""
    return linear.merge_low_rank(factors)


def kernel(parameters: config.MethodParameters, given: KernelInputs) -> Kernel:
    """`merge` of a chunk in host memory."""
    ones = torch.ones_like(given.coefficients)
    return weighted_sum_kernel(ones / ones.sum())


METHOD = Method(
    config.Average,
    merge,
    summary="plain mean of the weights",
    source="2203.05482",
    space="weight",
    shape="elementwise",
    idempotent=lambda parameters: True,
    low_rank=merge_low_rank,
    host_kernel=kernel,
)
