"""Spherical interpolation of two models' weights (Shoemake, SIGGRAPH 1985), tensor by tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.method import Method
from modelweld.methods.numerics.election import weighted_sum
from modelweld.methods.numerics.operands import (
    Weights,
    coefficients,
    gram,
    normalized,
    stacked,
)
from modelweld.methods.streaming import (
    InnerProducts,
    Kernel,
    KernelInputs,
    StatisticsPass,
    inner_products,
    weighted_sum_kernel,
)

_PARALLEL = 1e-6  # sine below which the arc is a line to float64


def merge(stack: Tensor, *, t: float | None = None, weights: Weights | None = None) -> Tensor:
    """`(*shape)`: from the first (t = 0) to the second (t = 1) of `(2, *shape)` along the arc between them.

    sin((1-t)θ)/sin θ · W_0 + sin(tθ)/sin θ · W_1, θ the angle between the flattened weights; linear where they are
    parallel, opposite or zero. Without `t` it is the second's share of the weights. float32 (float64 for float64).
    Raises MergeError for any other number of models, and for weights that sum to zero without `t`.
    """
    stack = stacked(stack)
    if stack.shape[0] != 2:
        raise MergeError(f"slerp merges two models, not {stack.shape[0]}", hint="name exactly two in `models:`")
    return weighted_sum(stack, slerp_coefficients(gram(stack), t=t, weights=weights).to(stack.dtype))


def slerp_coefficients(products: Tensor, *, t: float | None = None, weights: Weights | None = None) -> Tensor:
    """`(2,)`: what each model is multiplied by, from the inner products `(2, 2)` of their weights, in float64."""
    c = coefficients(weights, products)
    share = normalized(c, weights, otherwise="set `t`")[1] if t is None else torch.full_like(c[0], t)
    norms = products.diagonal().sqrt().prod()
    cosine = (products[0, 1] / torch.where(norms > 0, norms, 1)).clamp(-1, 1)
    angle = torch.where(norms > 0, cosine, 1).acos()
    curved = angle.sin() > _PARALLEL
    sine = torch.where(curved, angle.sin(), 1)
    first = torch.where(curved, ((1 - share) * angle).sin() / sine, 1 - share)
    second = torch.where(curved, (share * angle).sin() / sine, share)
    return torch.stack([first, second])


def _kernel(parameters: config.Slerp, given: KernelInputs) -> Kernel:
    known: InnerProducts = given.statistics
    found = slerp_coefficients(known.products, t=parameters.t, weights=given.weights)
    return weighted_sum_kernel(found.to(given.coefficients.dtype))


METHOD = Method(
    config.Slerp,
    merge,
    summary="along the arc between two models",
    source="Shoemake, SIGGRAPH 1985",
    space="weight",
    models=(2, 2),
    idempotent=lambda parameters: True,
    statistics=StatisticsPass(inner_products),
    host_kernel=_kernel,
)
