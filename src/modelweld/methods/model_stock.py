"""Model Stock: how far to go from the base to the experts' mean, from the angle between them (arXiv 2403.19522)."""

from __future__ import annotations

from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.method import Method
from modelweld.methods.numerics.election import weighted_sum
from modelweld.methods.numerics.operands import gram, stacked
from modelweld.methods.streaming import (
    InnerProducts,
    Kernel,
    KernelInputs,
    StatisticsPass,
    inner_products,
    weighted_sum_kernel,
)


def merge(deltas: Tensor) -> Tensor:
    """`(*shape)`: t · mean D_i of `(N, *shape)`, t = N cos θ / (1 + (N-1) cos θ) (equation 2), θ over this tensor.

    cos θ is the mean over the pairs of models; where it is negative or undefined (a zero delta) it counts as 0, so
    that t stays within [0, 1]. float32 (float64 for float64). Raises MergeError for fewer than two models.
    """
    deltas = stacked(deltas)
    return weighted_sum(deltas, stock_coefficients(gram(deltas)).to(deltas.dtype))


def stock_coefficients(products: Tensor) -> Tensor:
    """`(N,)`: t / N for each model, from the inner products `(N, N)` of the deltas, in float64."""
    count = products.shape[0]
    if count < 2:
        raise MergeError("model_stock needs at least two models", hint="name more in `models:`")
    norms = products.diagonal().sqrt()
    scale = norms[:, None] * norms
    cosines = (products / scale.where(scale > 0, 1)).triu(diagonal=1)
    cosine = (cosines.sum() / (count * (count - 1) / 2)).clamp(0, 1)
    return (cosine / (1 + (count - 1) * cosine)).expand(count)


def _kernel(parameters: config.ModelStock, given: KernelInputs) -> Kernel:
    known: InnerProducts = given.statistics
    return weighted_sum_kernel(stock_coefficients(known.products).to(given.coefficients.dtype))


METHOD = Method(
    config.ModelStock,
    merge,
    summary="the mean, drawn to the base by the angle between task vectors",
    source="2403.19522",
    models=(2, None),
    statistics=StatisticsPass(inner_products),
    host_kernel=_kernel,
)
