"""The joint singular basis of a stack of matrices, from float64 Gram matrices instead of the SVD of the wide matrix.

For [D_1 | … | D_N] = U S Vᵀ the projections P_i = Uᵀ D_i are S V_iᵀ, and U comes from the eigenvectors of
Σ D_i D_iᵀ (n × n), or, where that is smaller, of the N·m side. Gram and eigenvectors are float64 always: a float32
Gram moves the result of a subspace method by percents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float64).eps
_COLUMNS = 1024  # of a matrix converted to float64 at a time
_SPLIT = 256  # rows from which computing only the Gram matrix's lower blocks pays


@dataclass(frozen=True)
class JointProjection:
    """`basis` (n, r) with orthonormal columns, `projections` (N, r, m) = basisᵀ D_i, `singular` (r,), all float64.

    On a CPU r is the rank. Elsewhere the rank is not waited for: r is the Gram matrix's size, what lies below the cut
    is zero in all three, and `rank` (0-d) counts the rest.
    """

    basis: Tensor
    projections: Tensor
    singular: Tensor
    rank: Tensor


def joint_projection(stack: Tensor, rank_tolerance: float) -> JointProjection:
    """The joint basis of `(N, n, m)` with every singular value above `rank_tolerance` times the largest.

    What a float64 Gram matrix cannot tell from rounding, about 1e-7 of the largest, is cut in any case.
    """
    count, n, m = stack.shape
    if n <= count * m:
        values, vectors = torch.linalg.eigh(_gram(stack))
        singular, (vectors,), rank = _cut(values, rank_tolerance, vectors)
        projections = torch.empty(count, vectors.shape[1], m, dtype=torch.float64, device=stack.device)
        for index, start, piece in _pieces(stack):
            torch.mm(vectors.mT, piece, out=projections[index, :, start : start + piece.shape[1]])
        return JointProjection(vectors, projections, singular, rank)
    # The smaller side is N·m: its eigenvectors give V, and the wide matrix D brings them over to U = D V / σ.
    values, vectors = torch.linalg.eigh(_gram(_wide(stack).mT.unsqueeze(0)))
    singular, (vectors,), rank = _cut(values, rank_tolerance, vectors)
    basis = (_wide(stack) @ vectors).mul_(torch.where(singular > 0, 1 / singular, 0))
    projections = torch.empty(count, vectors.shape[1], m, dtype=torch.float64, device=stack.device)
    torch.mul(vectors.reshape(count, m, -1).mT, singular[:, None], out=projections)
    return JointProjection(basis, projections, singular, rank)


def _wide(stack: Tensor) -> Tensor:
    """[D_1 | … | D_N] (n, N·m) in float64; made anew for each use, so that it is not beside the eigenproblem."""
    count, n, m = stack.shape
    return stack.transpose(0, 1).reshape(n, count * m).double()


def _cut(values: Tensor, rank_tolerance: float, vectors: Tensor) -> tuple[Tensor, tuple[Tensor], Tensor]:
    floor = max(rank_tolerance**2, len(values) * _EPSILON)
    keep = values > floor * values[-1]  # ascending
    rank = keep.sum()
    if values.device.type == "cpu":
        first = len(values) - int(rank)
        return values[first:].sqrt(), (vectors[:, first:],), rank
    return torch.where(keep, values, 0).sqrt(), (vectors * keep,), rank


def _gram(stack: Tensor) -> Tensor:
    """Σ D_i D_iᵀ (n, n) in float64; only the lower triangle is sure to be filled, which is all that eigh reads."""
    n = stack.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=stack.device)
    for _, _, piece in _pieces(stack):
        add_gram_(gram, piece)
    return gram


def add_gram_(gram: Tensor, matrix: Tensor) -> None:
    """Adds X Xᵀ of a matrix (n, k) to `gram` (n, n); only the lower triangle is sure to get it."""
    for top, bottom in pairwise(_edges(gram)):
        gram[top:bottom, :bottom].addmm_(matrix[top:bottom], matrix[:bottom].mT)


def symmetric_(gram: Tensor) -> Tensor:
    """The matrix, once what `add_gram_` left out of its upper triangle has been copied from the lower one."""
    for top, bottom in pairwise(_edges(gram)):
        if top:
            gram[:top, top:bottom] = gram[top:bottom, :top].mT
    return gram


def _edges(gram: Tensor) -> list[int]:
    """Where the bands of rows begin and end of which a symmetric matrix is computed; on an accelerator one band."""
    n = gram.shape[0]
    parts = 4 if n >= _SPLIT and gram.device.type == "cpu" else 1
    return [n * part // parts for part in range(parts + 1)]


def _pieces(stack: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Every matrix in float64, on a CPU some columns at a time: model, first column, and the piece until the next."""
    count, _, m = stack.shape
    if stack.device.type != "cpu" or stack.dtype == torch.float64:
        for index in range(count):
            yield index, 0, stack[index].double()
        return
    # Fresh memory for every piece would cost more than converting it.
    scratch = torch.empty_like(stack[0, :, :_COLUMNS], dtype=torch.float64)
    for index in range(count):
        for start in range(0, m, _COLUMNS):
            piece = stack[index, :, start : start + _COLUMNS]
            yield index, start, scratch[:, : piece.shape[1]].copy_(piece)


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (n, k), σ (k,), Vᵀ (k, m) in float64, σ descending; what rounding alone has made is zero in all three.

    Directions without weight would otherwise be arbitrary unit vectors, which a method that orthogonalises or equalises
    them would make as strong as the rest.
    """
    left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    if singular.numel() == 0:
        return left, singular, right
    keep = singular > max(matrix.shape) * _EPSILON * singular[0]
    return left * keep, torch.where(keep, singular, 0), right * keep[:, None]


def orthogonalised(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (Procrustes): P Qᵀ for columns = P S Qᵀ, over its numerical range."""
    left, _, right = thin_svd(columns)
    return left @ right
