"""Decom-Renorm-Merge: prune and merge task vectors in their joint singular basis (arXiv 2505.23117, section 3).

`merge` does one weight. A sweep factorises it once and finishes it many times, since the basis depends neither on the
drop rate nor on the weights; `merge_low_rank` stays in the factors of LoRA adapters.

    basis = factorise(deltas, direction="horizontal")
    candidates = [finish(basis, drop_rate=p) for p in (0.5, 0.8, 0.9)]
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.method import Method
from modelweld.methods.numerics import kernels
from modelweld.methods.numerics.election import blocks, elect_
from modelweld.methods.numerics.low_rank import LowRank, require_finite_factors
from modelweld.methods.numerics.operands import Weights, coefficients_or_none, require_finite, stacked
from modelweld.methods.numerics.selection import nonzeros, pruned, quota_threshold
from modelweld.methods.numerics.spectrum import JointProjection, joint_projection
from modelweld.methods.numerics.work import Work, joint_basis_work, joint_factor_work

RANK_TOLERANCE = 1e-2
_NOISE = 1e-6  # a model's share of a singular direction below which only rounding has put it there

_BLOCKS_BYTES = 1 << 25  # for blocks that stay in a cache, samples, and what an allocator keeps


@dataclass(frozen=True)
class DrmBasis:
    """A weight's joint basis: `basis` U (n, r), `directions` v̂ (N, r, m) with unit or zero rows, `strengths` s (N, r).

    Everything is float64 and belongs to the horizontal problem; `vertical` says that the result is to be transposed.
    `active` marks the models that trained this weight, `rank` counts the singular values above the cut; both stay on
    the device.
    """

    basis: Tensor
    directions: Tensor
    strengths: Tensor
    active: Tensor
    rank: Tensor
    vertical: bool


def merge(
    deltas: Tensor,
    *,
    direction: str = "horizontal",
    drop_rate: float = 0.8,
    weights: Weights | None = None,
    rank_tolerance: float = RANK_TOLERANCE,
    disjoint_mean: bool = True,
    diagnostics: MutableMapping[str, Any] | None = None,
    cache: MutableMapping[Hashable, Any] | None = None,
) -> Tensor:
    """The merged task vector `(n, m)` of `(N, n, m)`, in float64; the stack is left as it was.

    Models that did not train this weight (all zero) do not take part; if none did, the result is zero. `diagnostics`
    gets the `rank` of the basis, its `direction`, and what `finish` leaves there. With a `cache` of this weight's own
    the basis is kept for other drop rates and weights. Raises MergeError for another shape, an unknown direction, a
    drop rate outside [0, 1), and values that are not finite.
    """
    basis = _basis(
        cache,
        (direction, rank_tolerance),
        lambda: factorise(deltas, direction=direction, rank_tolerance=rank_tolerance),
        diagnostics,
    )
    return finish(basis, drop_rate=drop_rate, weights=weights, disjoint_mean=disjoint_mean, diagnostics=diagnostics)


def merge_low_rank(
    factors: Sequence[LowRank],
    *,
    direction: str = "horizontal",
    drop_rate: float = 0.8,
    weights: Weights | None = None,
    rank_tolerance: float = RANK_TOLERANCE,
    disjoint_mean: bool = True,
    diagnostics: MutableMapping[str, Any] | None = None,
    cache: MutableMapping[Hashable, Any] | None = None,
) -> LowRank:
    """The merged task vector as float64 factors, equal to `merge` of the dense ones but never as large as they are."""
    basis = _basis(
        cache,
        (direction, rank_tolerance),
        lambda: factorise_low_rank(factors, direction=direction, rank_tolerance=rank_tolerance),
        diagnostics,
    )
    return finish_low_rank(
        basis, drop_rate=drop_rate, weights=weights, disjoint_mean=disjoint_mean, diagnostics=diagnostics
    )


def _basis(
    cache: MutableMapping[Hashable, Any] | None,
    key: Hashable,
    factorise: Callable[[], DrmBasis],
    diagnostics: MutableMapping[str, Any] | None,
) -> DrmBasis:
    """The basis, which depends on neither drop rate nor weights, from an earlier merge of this weight if there was."""
    basis: DrmBasis | None = None if cache is None else cache.get(key)
    if basis is None:
        basis = factorise()
        if cache is not None:
            cache[key] = basis
    if diagnostics is not None:
        diagnostics.update(rank=basis.rank, direction="vertical" if basis.vertical else "horizontal")
    return basis


def resolved_direction(direction: str, n: int, m: int) -> str:
    """`horizontal` or `vertical`: for `auto` the one whose eigenproblem is smaller, for `(n, m)` matrices (out, in)."""
    if direction == "auto":
        return "horizontal" if n <= m else "vertical"
    if direction not in ("horizontal", "vertical"):
        raise MergeError(f"unknown direction {direction!r}", hint="horizontal, vertical or auto")
    return direction


def working_bytes(count: int, n: int, m: int, *, direction: str = "horizontal") -> int:
    """What `merge` of `(count, n, m)` takes at its peak on a CPU, beside the stack it is given."""
    if resolved_direction(direction, n, m) == "vertical":
        n, m = m, n
    side = min(n, count * m)  # of the eigenproblem, which takes four such squares
    bringing_over = side**2 + 2 * count * n * m if side < n else 0
    finishing = count * side * m + n * side + (side + n) * m  # projections, basis, merged rows and the result
    arrays = 8 * (max(4 * side**2, bringing_over, finishing) + n * min(m, 1024))
    return arrays + min(arrays, _BLOCKS_BYTES)


def factorise(deltas: Tensor, *, direction: str = "horizontal", rank_tolerance: float = RANK_TOLERANCE) -> DrmBasis:
    """The part of `merge` that depends on neither drop rate nor weights, for sweeps over them."""
    deltas = stacked(deltas, dtype=deltas.dtype, matrices=True)
    active = _active(deltas)
    vertical = resolved_direction(direction, deltas.shape[1], deltas.shape[2]) == "vertical"
    found = joint_projection(deltas.mT if vertical else deltas, rank_tolerance)
    return _renormalised(found, found.basis, active, vertical)


def factorise_low_rank(
    factors: Sequence[LowRank], *, direction: str = "horizontal", rank_tolerance: float = RANK_TOLERANCE
) -> DrmBasis:
    """As `factorise`, for matrices given by their factors: only Σ R_i × m stacks are made."""
    if not factors:
        raise MergeError("no models", hint="give one pair of factors a model")
    vertical = resolved_direction(direction, *factors[0].shape) == "vertical"
    columns, cores = shared_columns([factor.transposed if vertical else factor for factor in factors])
    active = _active(cores)
    found = joint_projection(cores, rank_tolerance)
    return _renormalised(found, columns @ found.basis, active, vertical)


def shared_columns(factors: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Q (n, q) with orthonormal columns and cores C_i `(N, q, m)` with D_i = Q C_i, in float64; q ≤ Σ R_i."""
    shapes = {factor.shape for factor in factors}
    if len(shapes) > 1:
        raise MergeError(f"factors of different matrices: {sorted(shapes)}", hint="give the factors of one weight")
    require_finite_factors(factors)
    columns, mixing = torch.linalg.qr(torch.cat([factor.B.double() for factor in factors], dim=1))
    parts = mixing.split([factor.rank for factor in factors], dim=1)  # N × (q, R_i)
    cores = torch.empty(len(factors), columns.shape[1], factors[0].shape[1], dtype=mixing.dtype, device=mixing.device)
    for part, factor, core in zip(parts, factors, cores, strict=True):
        torch.mm(part, factor.A.double(), out=core)
    return columns, cores


def finish(
    basis: DrmBasis,
    *,
    drop_rate: float = 0.8,
    weights: Weights | None = None,
    disjoint_mean: bool = True,
    diagnostics: MutableMapping[str, Any] | None = None,
) -> Tensor:
    """The merged task vector `(n, m)` for one drop rate and one set of weights; the basis is left as it was.

    `diagnostics` gets two shares, 0-d and not waited for: `kept_share`, of the entries that pruning keeps, and
    `sign_conflicts`, of these that the election then discards.
    """
    merged = basis.basis @ _merged_rows(basis, drop_rate, weights, disjoint_mean, diagnostics)
    return merged.mT if basis.vertical else merged


def finish_low_rank(
    basis: DrmBasis,
    *,
    drop_rate: float = 0.8,
    weights: Weights | None = None,
    disjoint_mean: bool = True,
    diagnostics: MutableMapping[str, Any] | None = None,
) -> LowRank:
    """As `finish`, leaving the merged task vector in factors of the basis's rank."""
    merged = LowRank(basis.basis, _merged_rows(basis, drop_rate, weights, disjoint_mean, diagnostics))
    return merged.transposed if basis.vertical else merged


def _active(stack: Tensor) -> Tensor:
    """`(N,)`: which matrices of the stack are not all zero; refuses those of host memory that are not finite."""
    extremes = torch.stack([torch.stack(torch.aminmax(matrix)) for matrix in stack])  # (N, 2)
    if extremes.device.type == "cpu" and not bool(extremes.isfinite().all()):
        require_finite(stack)
    return extremes.ne(0).any(dim=1)


def _renormalised(found: JointProjection, basis: Tensor, active: Tensor, vertical: bool) -> DrmBasis:
    """Step 1 of the paper; the projections become the unit rows."""
    rows = found.projections  # (N, r, m)
    count, r, m = rows.shape
    strengths = torch.empty(count, r, dtype=rows.dtype, device=rows.device)
    for start, stop in blocks(r, count * m, rows):
        piece = rows[:, start:stop]
        norms = torch.linalg.vector_norm(piece, dim=2)  # (N, rows)
        real = norms > _NOISE * found.singular[start:stop]
        strengths[:, start:stop] = norms * real
        piece.mul_(torch.where(real, 1 / norms, 0).unsqueeze(2))
    return DrmBasis(basis, rows, strengths, active, found.rank, vertical)


def _merged_rows(
    basis: DrmBasis,
    drop_rate: float,
    weights: Weights | None,
    disjoint_mean: bool,
    diagnostics: MutableMapping[str, Any] | None,
) -> Tensor:
    """Steps 2 and 3 of the paper: (r, m) rows in the joint basis."""
    if not 0 <= drop_rate < 1:
        raise MergeError(f"drop_rate is {drop_rate}", hint="give a share from 0 to below 1")
    directions = basis.directions
    _, r, m = directions.shape
    c = coefficients_or_none(weights, directions)
    quota = basis.active.sum() * basis.rank * m  # L = N·r·m
    threshold = quota_threshold(directions, quota, 1 - drop_rate)
    divisor = None if disjoint_mean else basis.active.sum().clamp(min=1)
    merged = torch.empty(r, m, dtype=directions.dtype, device=directions.device)
    elect_rows = _elect_in_host_memory if merged.device.type == "cpu" else _elect_on_device
    kept, agreeing = elect_rows(basis, threshold, c, divisor, merged)
    if diagnostics is not None:
        diagnostics["kept_share"] = kept.double() / quota.clamp(min=1)
        diagnostics["sign_conflicts"] = (kept - agreeing) / kept.clamp(min=1)
    return merged


def _elect_in_host_memory(
    basis: DrmBasis, threshold: Tensor, c: Tensor | None, divisor: Tensor | None, merged: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills `merged`; how many entries are kept, and how many of these agree with the elected sign, 0-d both."""
    c = torch.ones(len(basis.directions), dtype=merged.dtype) if c is None else c
    kept, agreeing = kernels.elect_rows(
        basis.directions.numpy(),
        basis.strengths.numpy(),
        float(threshold),
        c.numpy(),
        0.0 if divisor is None else float(divisor),
        merged.numpy(),
    )
    return torch.tensor(kept), torch.tensor(agreeing)


def _elect_on_device(
    basis: DrmBasis, threshold: Tensor, c: Tensor | None, divisor: Tensor | None, merged: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_elect_in_host_memory`, without waiting for the device."""
    entries = pruned(basis.directions, threshold)  # (N, r, m)
    kept = nonzeros(entries)
    agreeing = merged.new_zeros(())
    entries.mul_(basis.strengths.unsqueeze(2))
    elect_(entries, c, divisor=divisor, out=merged, agreeing=agreeing)
    return kept, agreeing


def _sides(parameters: config.Drm, n: int, m: int) -> tuple[int, int]:
    """(n, m) of the horizontal problem: n rows have the joint basis."""
    return (n, m) if resolved_direction(parameters.direction, n, m) == "horizontal" else (m, n)


def _working_bytes(parameters: config.Drm, models: int, n: int, m: int) -> int:
    return working_bytes(models, n, m, direction=parameters.direction)


def _matrix_work(parameters: config.Drm, models: int, n: int, m: int) -> Work:
    return joint_basis_work(models, *_sides(parameters, n, m))


def _factor_work(parameters: config.Drm, models: int, rank: int, n: int, m: int) -> Work:
    return joint_factor_work(models, rank, *_sides(parameters, n, m))


METHOD = Method(
    config.Drm,
    merge,
    summary="prune and merge in the renormalised joint singular basis, horizontal or vertical",
    source="2505.23117",
    shape="matrix",
    low_rank=merge_low_rank,
    working_bytes=_working_bytes,
    matrix_work=_matrix_work,
    factor_work=_factor_work,
)
