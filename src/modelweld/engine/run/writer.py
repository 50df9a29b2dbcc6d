"""One tensor's results on their way out: checked, rounded, hashed and written, while what rounding takes is counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from blake3 import blake3
from torch import Tensor

from modelweld.checkpoints.buffers import bytes_of
from modelweld.checkpoints.shards import Slot
from modelweld.engine.output.journal import TensorRecord
from modelweld.engine.plan.records import TensorPlan, dtype_name
from modelweld.errors import MergeError


class Target(Protocol):
    """Where a tensor's bytes go: a shard on disk, or memory."""

    def write(self, slot: Slot, start: int, data: memoryview) -> None:
        """Put bytes at `start` of the slot."""


@dataclass
class Rounding:
    """Squared norms of the merged delta and of what the output's dtype took from the result."""

    delta: float = 0.0
    lost: float = 0.0

    def add(self, delta: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Count one chunk (all three flat); `exact` is overwritten."""
        self.delta += float(torch.dot(delta, delta))
        if rounded.dtype.itemsize < exact.dtype.itemsize:
            difference = exact.sub_(rounded.to(exact.dtype))  # a difference of two dtypes is several times slower
            self.lost += float(torch.dot(difference, difference))

    @property
    def survival(self) -> float:
        """1 - ‖rounded - exact‖ / ‖delta‖, at least 0; 1 where there was no delta to lose."""
        return max(0.0, 1.0 - math.sqrt(self.lost / self.delta)) if self.delta else 1.0


class TensorWriter:
    """Writes the chunks of one output tensor, in order, into its slot."""

    def __init__(self, tensor: TensorPlan, slot: Slot, out: Target) -> None:
        self._tensor, self._slot, self._out = tensor, slot, out
        self._hasher = blake3()
        self._rounding: Rounding | None = None

    def copy(self, values: Tensor, start: int) -> None:
        """Write values as they are, in the output's dtype."""
        self._emit(values.to(self._tensor.dtype), start)

    def weights(self, exact: Tensor, start: int) -> None:
        """Round and write merged weights; raises MergeError for results that are not finite."""
        rounded = exact.to(self._tensor.dtype)
        require_finite_result(exact, rounded, self._tensor)
        self._emit(rounded, start)

    def delta(self, delta: Tensor, exact: Tensor, start: int) -> None:
        """As `weights`, for base + delta in `exact`, which is overwritten; counts what rounding takes of the delta."""
        rounded = exact.to(self._tensor.dtype)
        require_finite_result(exact, rounded, self._tensor)
        self._emit(rounded, start)
        self._rounding = self._rounding or Rounding()
        self._rounding.add(delta, exact, rounded)

    def record(
        self,
        inputs: Mapping[str, str],
        diagnostics: Mapping[str, float | int | str] | None = None,
        fallback: Literal["cpu", "blocks"] | None = None,
    ) -> TensorRecord:
        """The record of the whole tensor, once every chunk is written; `inputs` are its operands' digests by model."""
        norm = math.sqrt(self._rounding.delta) if self._rounding else None
        survival = self._rounding.survival if self._rounding else None
        return TensorRecord(
            self._tensor.name, self._hasher.hexdigest(), inputs, norm, survival, diagnostics or {}, fallback
        )

    def _emit(self, values: Tensor, start: int) -> None:
        if values.numel():
            view = bytes_of(values.contiguous())
            self._hasher.update(view)
            self._out.write(self._slot, start * values.dtype.itemsize, view)


def require_finite_result(exact: Tensor, rounded: Tensor, tensor: TensorPlan) -> None:
    """Raise MergeError for a result that is not finite, before or after rounding."""
    if exact.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(exact))
    largest = torch.finfo(rounded.dtype).max
    # A little above the largest number some still round down to it.
    if (-largest <= low and high <= largest) or bool(rounded.isfinite().all()):
        return
    if bool(exact.isnan().any()):
        hint = "change its parameters, or the models' weights"
        raise MergeError(f"{tensor.method} gives NaN for these models", where=tensor.name, hint=hint)
    hint = "use a smaller scale" if rounded.dtype.itemsize >= 4 else "output: {dtype: float32}, or a smaller scale"
    raise MergeError(f"the merge overflows {dtype_name(rounded.dtype)}", where=tensor.name, hint=hint)
