"""How many floating-point operations a matrix method takes, by formula."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Operations on one weight: matrix products and QR, eigenproblems, and entries touched singly."""

    gemm: float
    eigh: float
    entries: float

    def __add__(self, other: Work) -> Work:
        """Both together."""
        return Work(self.gemm + other.gemm, self.eigh + other.eigh, self.entries + other.entries)

    @property
    def total(self) -> float:
        """All operations."""
        return self.gemm + self.eigh + self.entries


def joint_basis_work(models: int, n: int, m: int) -> Work:
    """Gram matrix, eigenproblem, projection and reconstruction of `models` matrices (n, m); n rows have the basis."""
    side = min(n, models * m)  # of the smaller Gram matrix
    gemm = 2.0 * n * models * m * side + 2.0 * n * models * m * side + 2.0 * n * m * side
    return Work(gemm, 9.0 * side**3, float(models * n * m))


def joint_factor_work(models: int, rank: int, n: int, m: int) -> Work:
    """As `joint_basis_work` from factors (n, R) and (R, m), R = `rank` of all models: QR, cores, and back to n rows."""
    side = min(rank, n)
    qr, cores, back = 4.0 * n * rank * side, 2.0 * side * rank * m, 2.0 * n * side * side
    inner = 4.0 * models * m * side * side
    return Work(qr + cores + inner + back, 9.0 * side**3, float(models * side * m))
