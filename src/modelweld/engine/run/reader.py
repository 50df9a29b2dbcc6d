"""Weights on their way in: read by position into buffers that are used again, hashed as they pass, widened, checked."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from blake3 import blake3
from torch import Tensor

from modelweld.checkpoints import Checkpoint
from modelweld.checkpoints.buffers import bytes_of
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import TensorPlan, dtype_name
from modelweld.engine.run.device_stream import DeviceStream
from modelweld.errors import CheckpointError

BASE = "base"
SAMPLE_BLOCKS = 64
SAMPLE_BLOCK = 1024
_READ = 1 << 22  # bytes of one read of a whole tensor

Hashers = Mapping[str, blake3]


class Cancelled(Exception):
    """Another thread has met an error: this one was asked to stop between two reads."""


class Reader:
    """One thread's way to the inputs. What it returns lies in its buffers, and is valid until the next such call.

    For an accelerator, chunks lie in two sets of page-locked buffers: one stays valid while the next is read.
    """

    def __init__(
        self, inputs: Inputs, stop: threading.Event, advance: Callable[[int], None], chunk: int, stream: DeviceStream
    ) -> None:
        self.chunk = chunk
        self._stream, self._turn = stream, 0
        self._inputs, self._stop, self._advance = inputs, stop, advance
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def check_stop(self) -> None:
        """Raise Cancelled when another thread has failed."""
        if self._stop.is_set():
            raise Cancelled

    def pieces(self, elements: int) -> Iterator[tuple[int, int]]:
        """Start and length of every chunk of a tensor."""
        for start in range(0, elements, self.chunk):
            yield start, min(self.chunk, elements - start)

    def read(self, source: Checkpoint, name: str, start: int, count: int, hasher: blake3 | None) -> Tensor:
        """`(count,)` elements from `start`, as they are stored; progress counts what is hashed."""
        self.check_stop()
        dtype = source.tensors[name].dtype
        size = count * dtype.itemsize
        if self._raw.numel() < size:
            self._raw = torch.empty(size, dtype=torch.uint8)
        raw = self._raw[:size]
        view = bytes_of(raw)
        source.read_into(name, start * dtype.itemsize, view)
        if hasher is not None:
            hasher.update(view)
            self._advance(size)
        return raw.view(dtype)

    def chunk_of(
        self,
        tensor: TensorPlan,
        base: Checkpoint | None,
        start: int,
        count: int,
        *,
        hashers: Hashers | None,
        check: bool,
    ) -> tuple[Tensor, Tensor]:
        """All experts' elements `(N, count)` in the working dtype, and the base's `(count,)`: none without a base.

        With `check`, NaN and infinities are refused, naming tensor and model.
        """
        experts = self._inputs.experts
        self._turn ^= self._stream.is_accelerator
        stack = self._buffer(f"experts {self._turn}", tensor.work_dtype, len(experts), count)
        origin = stack[0, :0]
        if base is not None:
            origin = self._buffer(f"base {self._turn}", tensor.work_dtype, 1, count)[0]
            origin.copy_(self.read(base, tensor.name, start, count, hashers[BASE] if hashers else None))
            if check:
                require_finite(origin, tensor.name, BASE, base, tensor.name)
        for row, expert, stored in zip(stack, experts, tensor.stored, strict=True):
            row.copy_(self.read(expert.checkpoint, stored, start, count, hashers[expert.label] if hashers else None))
        # Summing is the cheapest check, but it can overflow on finite input, so a non-finite sum is verified.
        if check and not math.isfinite(float(stack.sum())):
            for row, expert, stored in zip(stack, experts, tensor.stored, strict=True):
                require_finite(row, tensor.name, expert.label, expert.checkpoint, stored)
        return stack, origin

    def digests(self, tensor: TensorPlan, base: Checkpoint | None) -> dict[str, str]:
        """Digests of a tensor's bytes in every model, without a look at the values."""
        experts = zip(self._inputs.experts, tensor.stored, strict=True)
        sources = {expert.label: (expert.checkpoint, stored) for expert, stored in experts}
        if base is not None:
            sources[BASE] = (base, tensor.name)
        found = {}
        for label, (source, name) in sources.items():
            hasher = blake3()
            for start, count in self.pieces(tensor.elements):
                self.read(source, name, start, count, hasher)
            found[label] = hasher.hexdigest()
        return found

    def whole(self, source: Checkpoint, name: str, label: str, tensor: TensorPlan, digests: dict[str, str]) -> Tensor:
        """A whole checked tensor in the working dtype, in memory of its own; its digest goes to `digests`."""
        info, hasher = source.tensors[name], blake3()
        values = torch.empty(info.elements, dtype=tensor.work_dtype)
        step = _READ // info.dtype.itemsize
        for start in range(0, info.elements, step):
            part = values[start : start + step]
            part.copy_(self.read(source, name, start, part.numel(), hasher))
            require_finite(part, tensor.name, label, source, name)
        digests[label] = hasher.hexdigest()
        return values.reshape(tensor.shape)

    def _buffer(self, use: str, dtype: torch.dtype, rows: int, count: int) -> Tensor:
        key, size = (use, dtype), rows * max(count, self.chunk)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = self._stream.pinned_empty(size, dtype=dtype)
        return self._buffers[key][: rows * count].view(rows, count)  # (rows, count)


def sample_starts(elements: int) -> list[int]:
    """Where the blocks of a sample of about 64 K entries begin, spread evenly."""
    if elements <= SAMPLE_BLOCKS * SAMPLE_BLOCK:
        return list(range(0, elements, SAMPLE_BLOCK))
    last = elements - SAMPLE_BLOCK
    return [round(number * last / (SAMPLE_BLOCKS - 1)) for number in range(SAMPLE_BLOCKS)]


def require_finite(values: Tensor, name: str, label: str, source: Checkpoint, stored: str) -> None:
    """Raise CheckpointError naming tensor, model and file for NaN or infinite values."""
    wide = values if values.dtype.itemsize >= 4 else values.float()
    if math.isfinite(float(wide.sum())) or bool(torch.isfinite(wide).all()):
        return
    kind = "NaN" if bool(torch.isnan(wide).any()) else "infinite values"
    raise CheckpointError(
        f"{label} holds {kind} in tensor {name!r} ({dtype_name(values.dtype)})",
        where=source.place(stored),
        hint="fix or remove this model; merging cannot repair it",
    )
