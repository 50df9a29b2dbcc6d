"""Least squares over the moments of task vectors, of one side or both, factorised once for all ridges.

The formulae are those of `modelweld.methods.least_interference`. A weight that is much wider than high (or higher than
wide) is solved in the space that its task vectors span, and LoRA factors in the joint spaces of their rows and columns.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelweld.errors import MergeError
from modelweld.methods.numerics.low_rank import LowRank, joint_cores
from modelweld.methods.numerics.moments import moments, moments_bytes, moments_work
from modelweld.methods.numerics.operands import Weights, coefficients, require_finite, stacked
from modelweld.methods.numerics.work import Work

SIDES = ("input", "output", "both")
_LEAST_RIDGE = 1e-9  # of Σ c_i: keeps the condition within what float64 resolves
_BLOCKS_BYTES = 1 << 25  # for what an allocator and the libraries of matrix products keep


@dataclass(frozen=True)
class Factorised:
    """A weight's moments, and for both sides their eigenproblems; float64, for the transposed weight if `transposed`.

    With one side `cross` is C (p, q), `inputs` is A (q, q) and `outputs` is None. With both, `cross` is Pᵀ C Q,
    `inputs` are a (q,) and `outputs` are g (p,). `left` (n, p) and `right` (m, q) bring the result back to n rows and m
    columns, where they are not None. `total` is Σ c_i of the models that count, `energy` the objective of T = 0, 0-d.
    """

    cross: Tensor
    inputs: Tensor
    outputs: Tensor | None
    left: Tensor | None
    right: Tensor | None
    total: Tensor
    energy: Tensor
    smaller: int  # min(n, m)
    transposed: bool


def require_ranges(side: str, **values: float) -> None:
    """Raises MergeError for an unknown side, and for a value below 0 or not a number, naming it."""
    if side not in SIDES:
        raise MergeError(f"unknown side {side!r}", hint="input, output or both")
    for name, value in values.items():
        if not value >= 0:
            raise MergeError(f"{name} is {value}", hint="give a number of at least 0")


def factorise(
    deltas: Tensor,
    *,
    side: str = "input",
    power: float = 1.0,
    target_power: float = 1.0,
    weights: Weights | None = None,
) -> Factorised:
    """The part of `merge` that depends on neither `ridge` nor `t`."""
    require_ranges(side, power=power, target_power=target_power)
    deltas = stacked(deltas, dtype=deltas.dtype, matrices=True)
    require_finite(deltas)
    c = _shares(weights, deltas)
    stack = deltas.mT if side == "output" else deltas
    smaller = min(stack.shape[1:])
    # A space that the task vectors cannot fill is left for the part of it that they span.
    left, stack = _spanned(stack) if side == "both" else (None, stack)
    right, turned = _spanned(stack.mT)
    return _solved(left, turned.mT, right, smaller, c, side, power, target_power)


def factorise_low_rank(
    factors: Sequence[LowRank],
    *,
    side: str = "input",
    power: float = 1.0,
    target_power: float = 1.0,
    weights: Weights | None = None,
) -> Factorised:
    """As `factorise`, for matrices given by their factors."""
    require_ranges(side, power=power, target_power=target_power)
    left, cores, right = joint_cores([factor.transposed if side == "output" else factor for factor in factors])
    c = _shares(weights, cores)
    return _solved(left, cores, right, min(factors[0].shape), c, side, power, target_power)


def finish(
    factors: Factorised, *, ridge: float, t: float | None = None, diagnostics: MutableMapping[str, Any] | None = None
) -> Tensor:
    """The merged task vector `(n, m)` for one ridge and `t`; the factorisation is left as it was."""
    core = _core(factors, ridge, t, diagnostics)
    core = core if factors.left is None else factors.left @ core
    merged = core if factors.right is None else core @ factors.right.mT
    return merged.mT if factors.transposed else merged


def finish_low_rank(
    factors: Factorised, *, ridge: float, t: float | None = None, diagnostics: MutableMapping[str, Any] | None = None
) -> LowRank:
    """As `finish`, for the factorisation of factors, in the smaller of the two joint ranks."""
    core = _core(factors, ridge, t, diagnostics)
    if factors.left is None or factors.right is None:
        raise MergeError("the factorisation is of dense matrices", hint="use `finish`")
    p, q = core.shape
    by_outputs = p <= q
    merged = LowRank(
        factors.left if by_outputs else factors.left @ core,
        core @ factors.right.mT if by_outputs else factors.right.mT,
    )
    return merged.transposed if factors.transposed else merged


def _shares(weights: Weights | None, stack: Tensor) -> Tensor:
    """`(N,)` weights in float64; on a device those below 0 become NaN, since a look at them would wait for it."""
    c = coefficients(weights, stack).double()
    if c.device.type == "cpu" and bool((c < 0).any()):
        raise MergeError(
            f"the weights are {', '.join(f'{weight:g}' for weight in c.tolist())}",
            hint="give weights of at least 0: a task cannot count against the others",
        )
    return torch.where(c < 0, torch.nan, c)


def _spanned(stack: Tensor) -> tuple[Tensor | None, Tensor]:
    """Q (n, N m) and cores (N, N m, m) with D_i = Q C_i, where that halves n at least; else None and the stack."""
    count, n, m = stack.shape
    if 2 * count * m > n:
        return None, stack
    wide = stack.transpose(0, 1).reshape(n, count * m).double()
    basis, mixing = torch.linalg.qr(wide)
    return basis, mixing.reshape(-1, count, m).transpose(0, 1)


def _solved(
    left: Tensor | None,
    cores: Tensor,
    right: Tensor | None,
    smaller: int,
    c: Tensor,
    side: str,
    power: float,
    target_power: float,
) -> Factorised:
    found = moments(cores, c, power=power, target_power=target_power, outputs=side == "both")
    cross, inputs, outputs, total, energy = found.cross, found.inputs, found.outputs, found.total, found.energy
    del found  # and with it A and G, once they are decomposed
    if outputs is not None:
        inputs, own = torch.linalg.eigh(inputs)  # a (q,), Q (q, q)
        cross = cross @ own
        right = own if right is None else right @ own
        outputs, own = torch.linalg.eigh(outputs)  # g (p,), P (p, p)
        cross = own.mT @ cross  # (p, q)
        left = own if left is None else left @ own
    return Factorised(cross, inputs, outputs, left, right, total, energy, smaller, side == "output")


def _core(factors: Factorised, ridge: float, t: float | None, diagnostics: MutableMapping[str, Any] | None) -> Tensor:
    """T in the bases of `cross`, (p, q)."""
    if not ridge >= 0 or (t is not None and not t > 0):
        raise MergeError(f"ridge is {ridge}, t is {t}", hint="give a ridge of at least 0, and a t above 0")
    floor = factors.total * max(ridge / factors.smaller, _LEAST_RIDGE)
    floor = torch.where(floor > 0, floor, 1)  # where no model counts, and all else is zero
    merged = _one_sided(factors, floor) if factors.outputs is None else _two_sided(factors, factors.outputs, floor, t)
    if diagnostics is not None:
        remaining = _objective(factors, merged, floor) / torch.where(factors.energy > 0, factors.energy, 1)
        diagnostics["interference"] = remaining.clamp(min=0)
    return merged


def _objective(factors: Factorised, merged: Tensor, floor: Tensor) -> Tensor:
    """Σ c_i tr((T - D̃_i) A_i (T - D̃_i)ᵀ) without the ridge's share; of both sides the mean."""
    fitted = (merged * factors.cross).sum()
    if factors.outputs is None:
        # Since T (A + l I) = C, tr(T A Tᵀ) is ⟨T, C⟩ - l |T|².
        return factors.energy - fitted - floor * merged.square().sum()
    used = (factors.outputs[:, None] + factors.inputs[None, :]) / 2  # (p, q)
    return factors.energy - 2 * fitted + used.mul_(merged).mul_(merged).sum()


def _one_sided(factors: Factorised, floor: Tensor) -> Tensor:
    gram = factors.inputs.clone()
    gram.diagonal().add_(floor)
    lower = torch.linalg.cholesky_ex(gram).L  # never fails: the floor is far above rounding
    del gram
    return torch.cholesky_solve(factors.cross.mT, lower).mT


def _two_sided(factors: Factorised, outputs: Tensor, floor: Tensor, t: float | None) -> Tensor:
    g = (outputs.clamp(min=0) + floor)[:, None]  # (p, 1)
    a = (factors.inputs.clamp(min=0) + floor)[None, :]  # (1, q)
    low = torch.minimum(g, a)  # (p, q)
    merged = factors.cross / low
    if t is not None:
        # M_t with its larger argument, 1 / low, taken out: no power of the rest overflows.
        merged.mul_(low.div_(torch.maximum(g, a)).pow_(t).add_(1).div_(2).pow_(1 / t))
    return merged


def problem_bytes(count: int, n: int, m: int, *, side: str, power: float, target_power: float) -> int:
    """What `factorise` and `finish` of `(count, n, m)` take at their peak on a CPU, beside the stack."""
    n, m, rows, columns, both = _sizes(side, count, n, m)
    spanned = (rows * n if n < rows else 0) + (columns * m if m < columns else 0)
    summing = moments_bytes(n, m, products=power == target_power == 1, outputs=both) // 8
    if both:
        # The eigenproblems of the sides, one after the other, beside C and what is left of G or of A; then P, Q, C,
        # the divisors, and two products on the way back.
        solving = max(n * n + 4 * m * m + n * m, 4 * n * n + m * m + 2 * n * m, n * n + m * m + 4 * n * m)
    else:
        solving = 3 * m * m + 3 * n * m  # A, A + l I and its Cholesky factor; C, a copy and T
    arrays = 8 * (3 * spanned + max(summing, solving) + rows * columns)
    return arrays + min(arrays, _BLOCKS_BYTES)


def _sizes(side: str, count: int, n: int, m: int) -> tuple[int, int, int, int, bool]:
    """(n, m) of the problem that is solved, those of the weight as it is turned for it, and whether both sides are."""
    rows, columns = (m, n) if side == "output" else (n, m)
    both = side == "both"
    n = count * columns if both and 2 * count * columns <= rows else rows
    return n, min(columns, count * n) if 2 * count * n <= columns else columns, rows, columns, both


def problem_work(count: int, n: int, m: int, *, side: str, power: float, target_power: float) -> Work:
    """Operations of `factorise` and `finish` of `(count, n, m)`."""
    n, m, rows, columns, both = _sizes(side, count, n, m)
    # QR, and for both sides the product of its Q with the eigenvectors.
    bases = (6.0 if both else 4.0) * ((rows * n * n if n < rows else 0) + (columns * m * m if m < columns else 0))
    back = 2.0 * ((rows * n * columns if n < rows else 0) + (n * columns * m if m < columns else 0))
    inner = _inner_work(count, n, m, power == target_power == 1, both)
    return inner + Work(bases + back, 0.0, float(count * rows * columns))


def low_rank_work(count: int, rank: int, n: int, m: int, *, side: str, power: float, target_power: float) -> Work:
    """As `problem_work` from factors (n, R) and (R, m), R = `rank` of all models."""
    rows, columns = (m, n) if side == "output" else (n, m)
    p, q = min(rank, rows), min(rank, columns)
    bases = 4.0 * (rows * rank * p + columns * rank * q) + 2.0 * p * rank * q + 2.0 * (rows * p * p + columns * q * q)
    inner = _inner_work(count, p, q, power == target_power == 1, side == "both")
    return inner + Work(bases, 0.0, float(count * p * q))


def _inner_work(count: int, n: int, m: int, products: bool, both: bool) -> Work:
    summing = moments_work(count, n, m, products=products, outputs=both)
    if both:
        return summing + Work(4.0 * n * m * (n + m), 9.0 * (n**3 + m**3), 0.0)
    return summing + Work(m**3 / 3 + 2.0 * n * m * m, 0.0, 0.0)
