"""Figures about the deltas of an adapter, from its factors, without building a dense delta."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from modelweld.checkpoints import TensorInfo
from modelweld.checkpoints.adapter import Adapter
from modelweld.checkpoints.buffers import bytes_of

__all__ = ["FactorDelta", "other_base"]


class FactorDelta:
    """One adapted weight: B @ A, the delta of the base's tensor `info`.

    `squares` is the squared norm of the delta, `rank` how many of its singular values exceed `tolerance` times the
    largest, `finite_share` that of the two factors; the former two are NaN when a value is not finite.
    """

    def __init__(self, adapter: Adapter, info: TensorInfo, tolerance: float) -> None:
        self.info = info
        self.dtype = adapter.checkpoint.tensors[adapter.pairs[info.name].B].dtype
        B, A = adapter.factors(info.name, adapter.checkpoint.read)  # (n, r), (r, m)
        finite = int(torch.isfinite(B).sum()) + int(torch.isfinite(A).sum())
        self.finite_share = finite / (B.numel() + A.numel()) if B.numel() else 1.0
        self.squares, self.rank = math.nan, math.nan
        if self.finite_share == 1.0:
            singular = _singular_values(B, A)
            self.squares = float(singular.square().sum())
            self.rank = float((singular > tolerance * singular.max()).sum()) if singular.numel() else 0.0
        digest = blake3(bytes_of(B.contiguous()))
        digest.update(bytes_of(A.contiguous()))
        self.digest: bytes = digest.digest()

    @property
    def changed(self) -> int:
        """How many of the weight's elements the adapter moves: all of them, or none before it was trained."""
        return 0 if self.squares == 0 else self.info.elements


def _singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Those of B @ A, from the r × r product of the factors' triangles."""
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT)
    return values


def other_base(stated: Any, addresses: Iterable[str]) -> str | None:
    """The base that an adapter names as its own, when none of these addresses names it; None otherwise.

    Names are compared by their last part: an adapter keeps a hub's name or the path of another machine.
    """
    if not isinstance(stated, str) or not stated.strip("/\\"):
        return None
    name = re.split(r"[/\\]", stated.rstrip("/\\"))[-1].casefold()
    known = {part.casefold() for address in addresses for part in re.split(r"[/\\:@]", address)}
    return None if name in known else stated
