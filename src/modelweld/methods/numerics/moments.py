"""Which inputs and outputs the task vectors of one weight use, as second moments summed over the tasks.

A task vector D_i = U S Vᵀ (n, m), y = W x, uses the inputs V and writes to the outputs U. With the exponents p
(`power`) and q (`target_power`), Z_i = Σ S^2p and R_i = S^q |S| / |S^q|, a flatter spectrum of the same norm:

    A_i = V S^2p Vᵀ / Z_i (m, m)    G_i = U S^2p Uᵀ / Z_i (n, n)    D̃_i = U R_i Vᵀ    C_i = D̃_i A_i = G_i D̃_i

A_i and G_i have trace 1, so that a large task vector counts no more than a small one. Everything is float64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from modelweld.methods.numerics.spectrum import add_gram_, symmetric_
from modelweld.methods.numerics.work import Work

_EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Moments:
    """Sums over the tasks, each with its weight c_i; a task vector of zeros adds nothing.

    `cross` is Σ c_i C_i (n, m), `inputs` Σ c_i A_i (m, m), `outputs` Σ c_i G_i (n, n) where it was asked for. Three
    0-d tensors stay on the device: `total`, the weights of the tasks that count, and `energy`, Σ c_i tr(D̃_i A_i D̃_iᵀ).
    """

    cross: Tensor
    inputs: Tensor
    outputs: Tensor | None
    total: Tensor
    energy: Tensor


def moments(stack: Tensor, c: Tensor, *, power: float, target_power: float, outputs: bool) -> Moments:
    """The moments of `(N, n, m)` with the weights `(N,)`, float64 on the stack's device.

    Powers of 1 need no decomposition. Otherwise the smaller Gram matrix of each task vector is decomposed; what it
    cannot tell from rounding, singular values below about 1e-7 of the largest, is left out.
    """
    _, n, m = stack.shape
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=stack.device)
    sums = Moments(zeros(n, m), zeros(m, m), zeros(n, n) if outputs else None, zeros(()), zeros(()))
    for matrix, weight in zip(stack, c, strict=True):
        delta = matrix.double()
        unit, size = _normalised(delta)
        sums.total.add_(weight * (size > 0))
        if power == target_power == 1:
            _add_products(sums, delta, unit, size, weight)
        else:
            _add_powers(sums, unit, size, weight, power, target_power)
    symmetric_(sums.inputs)
    if sums.outputs is not None:
        symmetric_(sums.outputs)
    return sums


def _normalised(delta: Tensor) -> tuple[Tensor, Tensor]:
    """D / |D| and |D| (0-d); zeros stay zeros. Two steps, since the squares of tiny entries would vanish."""
    peak = torch.linalg.vector_norm(delta, ord=torch.inf)
    unit = delta / torch.where(peak > 0, peak, 1)
    norm = torch.linalg.vector_norm(unit)
    return unit.div_(torch.where(peak > 0, norm, 1)), peak * norm


def _add_products(sums: Moments, delta: Tensor, unit: Tensor, size: Tensor, weight: Tensor) -> None:
    """p = q = 1: A_i = Dᵀ D / |D|², G_i = D Dᵀ / |D|², C_i = D A_i = G_i D."""
    n, m = delta.shape
    from_outputs = _from_outputs(n, m, sums.outputs is not None)
    gram = _gram(unit if from_outputs else unit.mT).mul_(weight)  # c_i G_i or c_i A_i
    sums.energy.add_((size * _norm(gram)) ** 2 / _nonzero(weight))
    unit.mul_(weight.sqrt())
    if from_outputs:
        sums.cross.addmm_(gram, delta)
        add_gram_(sums.inputs, unit.mT)
        if sums.outputs is not None:
            sums.outputs.add_(gram)
        return
    sums.cross.addmm_(delta, gram)
    sums.inputs.add_(gram)
    if sums.outputs is not None:
        add_gram_(sums.outputs, unit)


def _add_powers(sums: Moments, unit: Tensor, size: Tensor, weight: Tensor, power: float, target_power: float) -> None:
    """Any p and q, from L = U √w and R = V √w with w = c S^2p / Z: A_i = R Rᵀ, G_i = L Lᵀ, C_i = L R_i Rᵀ."""
    n, m = unit.shape
    tall = unit if n >= m else unit.mT  # (k', k), k = min(n, m)
    values, near = torch.linalg.eigh(_gram(tall.mT))  # (k,), (k, k)
    keep = values > len(values) * _EPSILON * values[-1]
    sigma = torch.where(keep, values, 0).sqrt()
    used = _power(sigma, keep, 2 * power)
    used = weight * used / _nonzero(used.sum())  # w
    raised = _power(sigma, keep, target_power)
    target = size * raised * (_norm(sigma) / _nonzero(_norm(raised)))  # R_i
    near = near * used.sqrt()
    far = (tall @ near) / torch.where(keep, sigma, 1)  # (k', k)
    left, right = (far, near) if n >= m else (near, far)
    sums.energy.add_((used * target**2).sum())
    add_gram_(sums.inputs, right)
    if sums.outputs is not None:
        add_gram_(sums.outputs, left)
    sums.cross.addmm_(left * target, right.mT)


def _gram(matrix: Tensor) -> Tensor:
    """X Xᵀ (n, n) of a matrix (n, k)."""
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    add_gram_(gram, matrix)
    return symmetric_(gram)


def _power(sigma: Tensor, keep: Tensor, exponent: float) -> Tensor:
    return torch.where(keep, sigma**exponent, 0)


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm


def _nonzero(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1)


def moments_bytes(n: int, m: int, *, products: bool, outputs: bool) -> int:
    """What `moments` of `(N, n, m)` takes at its peak, the sums included; `products` says that both powers are 1."""
    small, large = min(n, m), max(n, m)
    sums = n * m + m * m + (n * n if outputs else 0)
    if products:
        each = (n if _from_outputs(n, m, outputs) else m) ** 2
    else:
        each = max(4 * small**2, 2 * small**2 + 2 * small * large)  # the eigenproblem; U √w, V √w and L R_i
    return 8 * (sums + 2 * n * m + each)


def moments_work(models: int, n: int, m: int, *, products: bool, outputs: bool) -> Work:
    """Operations of `moments` on `models` matrices (n, m), but for the entries touched singly."""
    small, large = min(n, m), max(n, m)
    sums = 2.0 * n * m * m + (2.0 * n * n * m if outputs else 0.0)
    if products:
        once = 2.0 * n * n * m if _from_outputs(n, m, outputs) else 2.0 * n * m * m  # C_i
        again = once if _from_outputs(n, m, outputs) and not outputs else 0.0  # G_i, which is not asked for
        return Work(models * (sums + once + again), 0.0, 0.0)
    sums = 2.0 * small * (m * m + (n * n if outputs else 0))
    each = 4.0 * small**2 * large + 2.0 * n * m * small  # Gram matrix and the far side, C_i
    return Work(models * (sums + each), models * 9.0 * small**3, 0.0)


def _from_outputs(n: int, m: int, outputs: bool) -> bool:
    """Whether C_i is G_i D_i or D_i A_i: the smaller one, where both are needed anyhow."""
    return n <= m if outputs else 2 * n < m
