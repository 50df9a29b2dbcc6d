"""Decom-Renorm-Merge: prune and merge task vectors in their joint singular basis (arXiv 2505.23117, section 3).

`merge` does one weight. A sweep factorises it once and finishes it many times, since the basis depends neither on the
drop rate nor on the weights; `merge_low_rank` stays in the factors of LoRA adapters.

    basis = factorise(deltas, direction="horizontal")
    candidates = [finish(basis, drop_rate=p) for p in (0.5, 0.8, 0.9)]
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelweld.errors import MergeError
from modelweld.methods.numerics import kernels
from modelweld.methods.numerics.election import blocks, elect_overwriting
from modelweld.methods.numerics.low_rank import LowRank, require_finite_factors
from modelweld.methods.numerics.operands import Weights, require_finite, shares, stacked
from modelweld.methods.numerics.selection import nonzeros, pruned, quota_threshold
from modelweld.methods.numerics.spectrum import JointProjection, joint_projection

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
) -> Tensor:
    """The merged task vector `(n, m)` of `(N, n, m)`, in float64; the stack is left as it was.

    Models that did not train this weight (all zero) have no say in it; if none did, the result is zero. Raises
    MergeError for another shape, an unknown direction, a drop rate outside [0, 1), and values that are not finite.
    """
    basis = factorise(deltas, direction=direction, rank_tolerance=rank_tolerance)
    return finish(basis, drop_rate=drop_rate, weights=weights, disjoint_mean=disjoint_mean)


def merge_low_rank(
    factors: Sequence[LowRank],
    *,
    direction: str = "horizontal",
    drop_rate: float = 0.8,
    weights: Weights | None = None,
    rank_tolerance: float = RANK_TOLERANCE,
    disjoint_mean: bool = True,
) -> LowRank:
    """The merged task vector as float64 factors, equal to `merge` of the dense ones but never as large as they are."""
    basis = factorise_low_rank(factors, direction=direction, rank_tolerance=rank_tolerance)
    return finish_low_rank(basis, drop_rate=drop_rate, weights=weights, disjoint_mean=disjoint_mean)


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
    notes: MutableMapping[str, Any] | None = None,
) -> Tensor:
    """The merged task vector `(n, m)` for one drop rate and one set of weights; the basis is left as it was.

    In `notes` it leaves two shares, 0-d and not waited for: `kept_share`, of the entries that pruning keeps, and
    `sign_conflicts`, of these that the election then discards.
    """
    merged = basis.basis @ _merged_rows(basis, drop_rate, weights, disjoint_mean, notes)
    return merged.mT if basis.vertical else merged


def finish_low_rank(
    basis: DrmBasis,
    *,
    drop_rate: float = 0.8,
    weights: Weights | None = None,
    disjoint_mean: bool = True,
    notes: MutableMapping[str, Any] | None = None,
) -> LowRank:
    """As `finish`, leaving the merged task vector in factors of the basis's rank."""
    merged = LowRank(basis.basis, _merged_rows(basis, drop_rate, weights, disjoint_mean, notes))
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
    notes: MutableMapping[str, Any] | None,
) -> Tensor:
    """Steps 2 and 3 of the paper: (r, m) rows in the joint basis."""
    if not 0 <= drop_rate < 1:
        raise MergeError(f"drop_rate is {drop_rate}", hint="give a share from 0 to below 1")
    directions = basis.directions
    _, r, m = directions.shape
    c = shares(weights, directions)
    quota = basis.active.sum() * basis.rank * m  # L = N·r·m
    threshold = quota_threshold(directions, quota, 1 - drop_rate)
    divisor = None if disjoint_mean else basis.active.sum().clamp(min=1)
    merged = torch.empty(r, m, dtype=directions.dtype, device=directions.device)
    elect_rows = _elect_in_host_memory if merged.device.type == "cpu" else _elect_on_device
    kept, agreeing = elect_rows(basis, threshold, c, divisor, merged)
    if notes is not None:
        notes["kept_share"] = kept.double() / quota.clamp(min=1)
        notes["sign_conflicts"] = (kept - agreeing) / kept.clamp(min=1)
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
    elect_overwriting(entries, c, divisor=divisor, out=merged, agreeing=agreeing)
    return kept, agreeing
