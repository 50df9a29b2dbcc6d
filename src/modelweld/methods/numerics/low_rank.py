"""A matrix kept as the product of two thin ones, as LoRA adapters are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelweld.errors import MergeError
from modelweld.methods.numerics.operands import require_finite


@dataclass(frozen=True)
class LowRank:
    """The matrix `B @ A` of shape (n, m): `B` (n, R), `A` (R, m), any scaling folded in."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise MergeError(
                f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} are not factors of one matrix",
                hint="B is (n, R) and A is (R, m)",
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix the factors stand for."""
        return (self.B.shape[0], self.A.shape[1])

    @property
    def rank(self) -> int:
        """The rank the factors have room for."""
        return self.A.shape[0]

    @property
    def transposed(self) -> LowRank:
        """The factors of the transposed matrix."""
        return LowRank(self.A.mT, self.B.mT)

    def dense(self) -> Tensor:
        """The matrix itself, (n, m)."""
        return self.B @ self.A


def joint_cores(factors: Sequence[LowRank]) -> tuple[Tensor, Tensor, Tensor]:
    """Q (n, q), cores K_i `(N, q, p)` and P (m, p) with D_i = Q K_i Pᵀ, in float64; q and p are at most Σ R_i.

    Q and P have orthonormal columns. Raises MergeError for no factors, factors of different shapes, and values that
    are not finite (in host memory).
    """
    if not factors:
        raise MergeError("no models", hint="give one pair of factors per model")
    shapes = {factor.shape for factor in factors}
    if len(shapes) > 1:
        raise MergeError(f"factors of different matrices: {sorted(shapes)}", hint="give the factors of one weight")
    require_finite_factors(factors)
    ranks = [factor.rank for factor in factors]
    left, rows = torch.linalg.qr(torch.cat([factor.B.double() for factor in factors], dim=1))  # (n, q), (q, Σ R_i)
    right, columns = torch.linalg.qr(torch.cat([factor.A.double().mT for factor in factors], dim=1))
    pairs = zip(rows.split(ranks, dim=1), columns.split(ranks, dim=1), strict=True)
    return left, torch.stack([row @ column.mT for row, column in pairs]), right


def require_finite_factors(factors: Sequence[LowRank], names: Sequence[str] = ()) -> None:
    """Refuses factors that hold NaN or infinities, naming the model; looks only at host memory."""
    for index, factor in enumerate(factors):
        name = [names[index] if index < len(names) else f"model {index}"]
        require_finite(factor.B.unsqueeze(0), name)
        require_finite(factor.A.unsqueeze(0), name)
