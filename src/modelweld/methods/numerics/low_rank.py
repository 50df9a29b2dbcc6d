"""A matrix kept as the product of two thin ones, as LoRA adapters are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def require_finite_factors(factors: Sequence[LowRank], names: Sequence[str] = ()) -> None:
    """Refuses factors that hold NaN or infinities, naming the model; looks only at host memory."""
    for index, factor in enumerate(factors):
        name = [names[index] if index < len(names) else f"model {index}"]
        require_finite(factor.B.unsqueeze(0), name)
        require_finite(factor.A.unsqueeze(0), name)
