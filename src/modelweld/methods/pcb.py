"""PCB-Merging: weigh every entry by how it competes within its task and across tasks (arXiv 2410.02396, section 3).

The formulae are those of the paper's code, which state the normalisation and activation that the text leaves open; the
statistics are taken per tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.method import Method
from modelweld.methods.numerics.election import weighted_sum
from modelweld.methods.numerics.operands import Weights, coefficients_or_none, require_finite, stacked
from modelweld.methods.numerics.selection import kth_smallest

_OUTLIERS = 1e-4  # share of the magnitudes that is pulled in, at either end


def merge(deltas: Tensor, *, density: float = 0.1, weights: Weights | None = None) -> Tensor:
    """`(*shape)`: Σ c_i s_i D_i / Σ s_i of `(N, *shape)`, in float32 (float64 for float64).

    The score exp(N · unit(|D_i|)²) · tanh(D_i ⊙ Σ_j D_j), unit(x) = (x - min) / (max - min), becomes the weight s_i:
    0 outside its largest `density` entries, and from there linearly up to 1. Of d magnitudes
    those outside the ranks floor(0.0001 d) + 1 and floor(0.9999 d) are first clamped to these. Raises MergeError for a
    density outside (0, 1] and values that are not finite.
    """
    deltas = stacked(deltas)
    require_finite(deltas)
    if not 0 < density <= 1:
        raise MergeError(f"density is {density}", hint="give a share above 0 and at most 1")
    if deltas.numel() == 0:
        return deltas[0].clone()
    together = deltas.sum(dim=0)
    clamped = torch.stack([_clamped(delta) for delta in deltas])
    scales = torch.stack(
        [
            _scale(inside.abs(), delta * together, len(deltas), density)
            for inside, delta in zip(clamped, deltas, strict=True)
        ]
    )
    merged = weighted_sum(clamped.mul_(scales), coefficients_or_none(weights, deltas))
    return merged.div_(scales.sum(dim=0).clamp_(min=1e-12))


def _clamped(delta: Tensor) -> Tensor:
    size = delta.numel()
    low = kth_smallest(delta, int(size * _OUTLIERS) + 1, magnitudes=True)
    high = kth_smallest(delta, int(size * (1 - _OUTLIERS) - 1) + 1, magnitudes=True)
    return delta.sign() * delta.abs().clamp(low, high)


def _scale(magnitude: Tensor, agreement: Tensor, count: int, density: float) -> Tensor:
    score = (count * _unit(magnitude, magnitude.min()) ** 2).exp_() * agreement.tanh()
    size = score.numel()
    floor = kth_smallest(score, min(size - round(size * density) + 1, size))
    return _unit(score.clamp_(min=floor), floor)


def _unit(values: Tensor, low: Tensor) -> Tensor:
    span = values.max() - low
    return (values - low) / torch.where(span > 0, span, 1)


METHOD = Method(
    config.Pcb,
    merge,
    summary="entries weighted by their competition within and across tasks",
    source="2410.02396",
    version="2",
)
