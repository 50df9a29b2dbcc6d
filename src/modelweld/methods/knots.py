"""KnOTS: merge in the joint singular basis, without renormalising it (arXiv 2410.19735, section 4)."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.drm import shared_columns
from modelweld.methods.method import Method
from modelweld.methods.numerics.election import elect, weighted_sum
from modelweld.methods.numerics.low_rank import LowRank
from modelweld.methods.numerics.operands import Weights, coefficients_or_none, require_finite, stacked
from modelweld.methods.numerics.selection import quota_threshold
from modelweld.methods.numerics.spectrum import JointProjection, joint_projection

RANK_TOLERANCE = 1e-5


def merge(
    deltas: Tensor,
    *,
    combine: str = "ties",
    density: float = 0.3,
    merge_scaled: bool = False,
    weights: Weights | None = None,
    rank_tolerance: float = RANK_TOLERANCE,
    diagnostics: MutableMapping[str, Any] | None = None,
) -> Tensor:
    """The merged task vector `(n, m)` of `(N, n, m)`, in float64: U Σ · merged(V_iᵀ) for [D_1 | … | D_N] = U Σ Vᵀ.

    The V_iᵀ are merged by TIES (each trimmed to `density` over all its entries) or summed, as the paper's text says.
    With `merge_scaled` the Σ V_iᵀ are trimmed and merged instead, as the authors' code does with `s_on_V`; it ranks the
    entries of all layers together, this function those of one weight. Singular values below `rank_tolerance` of the
    largest are left out. `diagnostics` gets the `rank`, under TIES those of `elect` too. Raises
    MergeError for another shape and values that are not finite.
    """
    deltas = stacked(deltas, dtype=deltas.dtype, matrices=True)
    require_finite(deltas)
    found = joint_projection(deltas, rank_tolerance)
    return found.basis @ _merged_rows(found, combine, density, merge_scaled, weights, diagnostics)


def merge_low_rank(
    factors: Sequence[LowRank],
    *,
    combine: str = "ties",
    density: float = 0.3,
    merge_scaled: bool = False,
    weights: Weights | None = None,
    rank_tolerance: float = RANK_TOLERANCE,
    diagnostics: MutableMapping[str, Any] | None = None,
) -> LowRank:
    """As `merge` of the dense matrices, in and out as factors."""
    columns, cores = shared_columns(factors)
    found = joint_projection(cores, rank_tolerance)
    return LowRank(columns @ found.basis, _merged_rows(found, combine, density, merge_scaled, weights, diagnostics))


def _merged_rows(
    found: JointProjection,
    combine: str,
    density: float,
    merge_scaled: bool,
    weights: Weights | None,
    diagnostics: MutableMapping[str, Any] | None,
) -> Tensor:
    if combine not in ("linear", "ties") or not 0 < density <= 1:
        raise MergeError(f"combine {combine!r}, density {density}", hint="linear or ties; a share above 0")
    if diagnostics is not None:
        diagnostics["rank"] = found.rank
    sigma = found.singular[:, None]  # (r, 1)
    c = coefficients_or_none(weights, found.projections)
    if combine == "linear":
        return weighted_sum(found.projections, c)
    divisor = torch.ones_like(sigma) if merge_scaled else torch.where(sigma > 0, sigma, 1)
    rows = found.projections / divisor  # Σ V_iᵀ or V_iᵀ, (N, r, m)
    quota = found.rank * rows.shape[2]
    thresholds = torch.stack([quota_threshold(own, quota, density) for own in rows])
    merged = elect(rows, c, thresholds=thresholds, diagnostics=diagnostics) * divisor
    if diagnostics is not None:
        # Off the CPU the rows beyond the rank are there, and zero.
        diagnostics["kept_share"] = diagnostics["kept_share"] * (len(sigma) / found.rank.clamp(min=1))
    return merged


METHOD = Method(
    config.Knots,
    merge,
    summary="TIES or the sum in the joint singular basis",
    source="2410.19735",
    shape="matrix",
    low_rank=merge_low_rank,
)
