"""TSV-M: keep each task's leading singular vectors and make those of different tasks orthogonal (arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.drm import shared_columns
from modelweld.methods.method import Method
from modelweld.methods.numerics.low_rank import LowRank
from modelweld.methods.numerics.operands import Weights, coefficients, require_finite, stacked
from modelweld.methods.numerics.spectrum import orthogonalised, thin_svd


def merge(
    deltas: Tensor,
    *,
    rank_share: float | None = None,
    spectrum_power: float = 1.0,
    weights: Weights | None = None,
    diagnostics: MutableMapping[str, Any] | None = None,
) -> Tensor:
    """The merged task vector `(n, m)` of `(N, n, m)`, in float64: U⊥ diag(c_i Σ_i) V⊥ᵀ (algorithm 1).

    Each task keeps floor(rank_share · min(n, m)) singular triples (default 1/N, at least one); the concatenated U and V
    are replaced by the nearest orthonormal matrices. `spectrum_power` q puts σ^q in the place of each task's σ, with
    the same sum: 1 is the paper's, 0 makes the kept spectrum flat. `diagnostics` gets the `rank`, how many triples are
    kept. Raises MergeError for another shape and values that are not finite.
    """
    deltas = stacked(deltas, dtype=deltas.dtype, matrices=True)
    require_finite(deltas)
    kept = _kept(deltas[0].shape, len(deltas), rank_share)
    if diagnostics is not None:
        diagnostics["rank"] = kept * len(deltas)
    return _merge(deltas, kept, spectrum_power, weights).dense()


def merge_low_rank(
    factors: Sequence[LowRank],
    *,
    rank_share: float | None = None,
    spectrum_power: float = 1.0,
    weights: Weights | None = None,
    diagnostics: MutableMapping[str, Any] | None = None,
) -> LowRank:
    """As `merge` of the dense matrices, in and out as factors: only Σ R_i × Σ R_i matrices are decomposed."""
    left, cores = shared_columns(factors)  # D_i = left C_i
    right = torch.linalg.qr(torch.cat([factor.A.double().mT for factor in factors], dim=1)).Q  # (m, p)
    small = cores @ right  # (N, q, p): D_i = left small_i rightᵀ
    kept = min(_kept(factors[0].shape, len(factors), rank_share), max(factor.rank for factor in factors))
    if diagnostics is not None:
        diagnostics["rank"] = kept * len(factors)
    merged = _merge(small, kept, spectrum_power, weights)
    return LowRank(left @ merged.B, merged.A @ right.mT)


def _kept(shape: Sequence[int], count: int, rank_share: float | None) -> int:
    share = 1 / count if rank_share is None else rank_share
    if not 0 < share <= 1:
        raise MergeError(f"rank_share is {share}", hint="give a share above 0 and at most 1")
    return max(int(min(shape) * share), 1)


def _merge(deltas: Tensor, kept: int, power: float, weights: Weights | None) -> LowRank:
    c = coefficients(weights, deltas.double())
    triples = [thin_svd(delta) for delta in deltas]
    spectra = [_shaped(sigma[:kept], power) * ci for (_, sigma, _), ci in zip(triples, c, strict=True)]
    left = orthogonalised(torch.cat([u[:, :kept] for u, _, _ in triples], dim=1))  # (n, N k)
    right = orthogonalised(torch.cat([vt[:kept].mT for _, _, vt in triples], dim=1))  # (m, N k)
    return LowRank(left * torch.cat(spectra), right.mT)


def _shaped(sigma: Tensor, power: float) -> Tensor:
    if power == 1:
        return sigma
    raised = torch.where(sigma > 0, sigma**power, 0)
    total = raised.sum()
    return raised * (sigma.sum() / torch.where(total > 0, total, 1))


def _output_rank(ranks: Sequence[int]) -> int:
    return len(ranks) * max(ranks)


METHOD = Method(
    config.TsvM,
    merge,
    summary="orthogonalised leading singular vectors of every task",
    source="2412.00081",
    shape="matrix",
    low_rank=merge_low_rank,
    output_rank=_output_rank,
)
