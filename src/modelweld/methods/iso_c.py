"""Iso-C: the sum of the task vectors with a flat spectrum (arXiv 2502.04959, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.methods.method import Method
from modelweld.methods.numerics.election import weighted_sum
from modelweld.methods.numerics.operands import Weights, coefficients_or_none, require_finite, stacked
from modelweld.methods.numerics.spectrum import thin_svd


def merge(deltas: Tensor, *, weights: Weights | None = None) -> Tensor:
    """The merged task vector `(n, m)` of `(N, n, m)`, in float64: σ̄ U Vᵀ for Σ c_i D_i = U Σ Vᵀ, σ̄ the mean of Σ.

    Mean and product run over the numerical rank: the paper's for a full-rank sum, and without noise for a deficient
    one. Raises MergeError for another shape and values that are not finite.
    """
    deltas = stacked(deltas, dtype=torch.float64, matrices=True)
    require_finite(deltas)
    left, sigma, right = thin_svd(weighted_sum(deltas, coefficients_or_none(weights, deltas)))
    return (left * mean_singular_value(sigma)) @ right


def mean_singular_value(sigma: Tensor) -> Tensor:
    """The mean of the singular values that are not zero; 0 when all are."""
    return sigma.sum() / (sigma > 0).sum().clamp(min=1)


METHOD = Method(
    config.IsoC,
    merge,
    summary="the sum of the task vectors with a flat spectrum",
    source="2502.04959",
    shape="matrix",
)
