"""One output tensor from the models' bytes to its own: read, check, merge, round, digest, write.

Methods that look at an entry at a time, or at the whole tensor through a few numbers, run in chunks: every byte is
read, hashed, merged and written while it is in a core's cache. Other methods get the whole tensor. Either way a tensor
is one thread's work, in order, so that its bytes, digest and statistics do not depend on how many threads there are.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from blake3 import blake3
from torch import Tensor

from modelweld.checkpoints import Checkpoint
from modelweld.checkpoints.shards import Slot
from modelweld.config.methods import MethodParameters
from modelweld.engine.output.journal import TensorRecord
from modelweld.engine.plan.inputs import Expert, Inputs
from modelweld.engine.plan.records import TensorPlan
from modelweld.engine.run.chunks import Combine, in_host_memory, on_device
from modelweld.engine.run.device_stream import CHUNK as DEVICE_CHUNK
from modelweld.engine.run.device_stream import DeviceStream
from modelweld.engine.run.diagnostics import to_plain
from modelweld.engine.run.factors import factors_of, merge_factors, stored_factor
from modelweld.engine.run.packing import merge_packed
from modelweld.engine.run.reader import BASE, SAMPLE_BLOCK, Cancelled, Hashers, Reader, require_finite, sample_starts
from modelweld.engine.run.writer import Target, TensorWriter
from modelweld.errors import MergeError
from modelweld.methods.method import TensorContext
from modelweld.methods.numerics.low_rank import LowRank
from modelweld.methods.registry import method
from modelweld.methods.streaming import TensorStatistics

__all__ = ["CHUNK", "Cancelled", "Worker", "chunk_elements"]

_CACHE = 1 << 23  # bytes of one chunk across all models, per thread
_ROWS = 4  # of a chunk beside the experts': the base, the result, and two on the way
CHUNK = 1 << 16  # elements of the final pass over a whole tensor


R = TypeVar("R")


def chunk_elements(experts: int) -> int:
    """How many elements of each model are worked on at once, a power of two.

    Threads take turns at the interpreter between two steps on a chunk. With three models on two cores, 256 K elements
    ran 1.9 times as fast as 64 K, which fit a core's own cache but let the threads wait for each other.
    """
    fitting = _CACHE // (4 * (experts + _ROWS))
    return min(1 << 18, max(1 << 14, 1 << (fitting.bit_length() - 1)))


@dataclass
class _Shared:
    """A whole tensor's inputs as they were read, their digests, and what a method keeps for other parameters.

    `fallback` is set when the device could not hold what the tensor takes.
    """

    origin: Tensor | None = None
    stack: Tensor | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    cache: dict[Hashable, Any] = field(default_factory=dict)
    fallback: Literal["cpu"] | None = None


class Worker:
    """What one thread needs to make tensors: its buffers, used again for each, and the way to the inputs."""

    def __init__(
        self, inputs: Inputs, device: torch.device, stop: threading.Event, advance: Callable[[int], None]
    ) -> None:
        self._inputs = inputs
        self._labels = tuple(expert.label for expert in inputs.experts)
        self._stream, self._host = DeviceStream(device), DeviceStream(torch.device("cpu"))
        chunk = DEVICE_CHUNK if self._stream.is_accelerator else chunk_elements(len(inputs.experts))
        self._reader = Reader(inputs, stop, advance, chunk, self._stream)
        self._shared: _Shared | None = None

    @contextlib.contextmanager
    def sharing(self, wanted: bool) -> Iterator[None]:
        """While it lasts, what one tensor's inputs and joint basis take is kept for making that tensor again."""
        self._shared = _Shared() if wanted else None
        try:
            yield
        finally:
            self._shared = None

    def make(self, tensor: TensorPlan, slot: Slot, out: Target) -> TensorRecord:
        """Write one tensor into its slot.

        Raises CheckpointError naming tensor and model for values that are not finite, MergeError from the method.
        """
        if tensor.parameters is None:
            return self._copy(tensor, slot, out)
        if tensor.route == "factors":
            return self._from_factors(tensor, tensor.parameters, slot, out)
        make = self._streamed if tensor.streamed_on(self._stream.kind) else self._whole
        return make(tensor, tensor.parameters, slot, out)

    def _copy(self, tensor: TensorPlan, slot: Slot, out: Target) -> TensorRecord:
        source = self._inputs.reference
        label = BASE if self._inputs.base is not None else self._labels[0]
        read, writer = blake3(), TensorWriter(tensor, slot, out)
        for start, count in self._reader.pieces(tensor.elements):
            values = self._reader.read(source, tensor.name, start, count, read)
            if values.is_floating_point():
                require_finite(values, tensor.name, label, source, tensor.name)
            writer.copy(values, start)
        return writer.record({label: read.hexdigest()})

    def _streamed(self, tensor: TensorPlan, parameters: MethodParameters, slot: Slot, out: Target) -> TensorRecord:
        chosen = method(parameters.method)
        base = self._inputs.base if chosen.needs_base else None
        hashers = {label: blake3() for label in (*self._labels, BASE)}
        statistics: TensorStatistics | None = None
        known: dict[str, str] = {}
        if chosen.statistics is not None:
            chunks = _TensorChunks(tensor, base, self._reader, hashers)
            statistics = chosen.statistics.collect(parameters, chunks)
            chunks.require_whole()
            known = _hexdigests(hashers)
        elif chosen.seeded:
            # Random streams are keyed by the experts' bytes, which have to be known before the first draw.
            known = self._reader.digests(tensor, base)
        combine = self._combine(tensor, parameters, known, statistics)

        def merged_pieces() -> Iterator[tuple[int, Tensor, Tensor]]:
            for start, count in self._reader.pieces(tensor.elements):
                stack, origin = self._reader.chunk_of(
                    tensor, base, start, count, hashers=None if known else hashers, check=statistics is None
                )
                yield start, origin, combine(stack, origin, start)

        writer = TensorWriter(tensor, slot, out)
        for start, origin, merged in _ahead(merged_pieces()) if self._stream.is_accelerator else merged_pieces():
            self._stream.synchronize()
            if base is None:
                writer.weights(merged, start)
            else:
                writer.delta(merged, origin.add_(merged), start)
        inputs = known or _hexdigests(hashers)
        if base is None:
            inputs = {label: inputs[label] for label in self._labels}
        said = to_plain(statistics.diagnostics(tensor.elements)) if statistics is not None else {}
        fallback: Literal["blocks"] | None = "blocks" if self._stream.block < DEVICE_CHUNK else None
        return writer.record(inputs, said, fallback)

    def _combine(
        self,
        tensor: TensorPlan,
        parameters: MethodParameters,
        known: dict[str, str],
        statistics: TensorStatistics | None,
    ) -> Combine:
        digests = tuple(known[label] for label in self._labels) if known else ()
        context = TensorContext(tensor.name, digests, self._labels, finite=True)
        if not self._stream.is_accelerator:
            return in_host_memory(parameters, self._inputs.weights, context, tensor.work_dtype, statistics)
        return on_device(parameters, self._inputs.weights, context, self._stream)

    def _whole(self, tensor: TensorPlan, parameters: MethodParameters, slot: Slot, out: Target) -> TensorRecord:
        chosen, shared = method(parameters.method), self._shared or _Shared()
        if shared.stack is None:
            shared.stack, shared.origin = self._gathered(tensor, parameters, shared.inputs)
        stack, origin, inputs = shared.stack, shared.origin, shared.inputs
        digests = tuple(inputs.get(label, "") for label in self._labels)

        def merge(stream: DeviceStream) -> tuple[Tensor, TensorContext]:
            context = TensorContext(tensor.name, digests, self._labels, finite=True, cache=shared.cache)
            merged = merge_packed(chosen, parameters, stream.to_device(stack), tensor, self._inputs.weights, context)
            return stream.to_host(merged), context

        merged, context = self._on_device(merge, shared, whole_matrix=chosen.whole_matrix)
        flat = origin.reshape(-1) if origin is not None and chosen.needs_base else None
        return self._written(merged.reshape(-1), flat, tensor, shared, context, slot, out)

    def _on_device(
        self, merge: Callable[[DeviceStream], tuple[R, TensorContext]], shared: _Shared, *, whole_matrix: bool
    ) -> tuple[R, TensorContext]:
        """What `merge` returns from the device; from the CPU where the device's memory does not suffice."""
        # Apple's GPUs have no float64, which subspace methods need.
        stream = self._host if self._stream.device.type == "mps" and whole_matrix else self._stream
        if shared.fallback is None:
            try:
                with stream.submit():
                    found = merge(stream)
                stream.synchronize()
            except torch.OutOfMemoryError:
                shared.fallback = "cpu"
                shared.cache.clear()
            else:
                return found
            stream.release_cached()
        return merge(self._host)

    def _gathered(
        self, tensor: TensorPlan, parameters: MethodParameters, inputs: dict[str, str]
    ) -> tuple[Tensor, Tensor | None]:
        """All experts' whole tensors `(N, *shape)`, less the base's where the method wants that, and the base's."""
        chosen, experts = method(parameters.method), self._inputs.experts
        adapted = tensor.route == "densified"
        base = self._inputs.base if chosen.needs_base or chosen.whole_matrix or adapted else None
        origin = self._reader.whole(base, tensor.name, BASE, tensor, inputs) if base is not None else None
        stack = self._stream.pinned_empty(len(experts), *tensor.shape, dtype=tensor.work_dtype)  # (N, *shape)
        for index, (expert, stored) in enumerate(zip(experts, tensor.stored, strict=True)):
            factors = self._factors(tensor, expert, inputs) if adapted else None
            if factors is not None:
                stack[index].copy_(factors.dense())
                if origin is not None and not chosen.needs_base:
                    stack[index].add_(origin)
                continue
            stack[index].copy_(self._reader.whole(expert.checkpoint, stored, expert.label, tensor, inputs))
            if origin is not None and chosen.needs_base:
                stack[index].sub_(origin)
        return stack, origin

    def _from_factors(self, tensor: TensorPlan, parameters: MethodParameters, slot: Slot, out: Target) -> TensorRecord:
        """As `_whole`, for a weight that every expert changes by low-rank factors, or not at all."""
        chosen, target = method(parameters.method), tensor.whole or tensor
        shared = self._shared or _Shared()
        inputs, origin = shared.inputs, shared.origin
        if tensor.whole is None and self._inputs.base is not None and origin is None:
            origin = shared.origin = self._reader.whole(self._inputs.base, tensor.name, BASE, tensor, inputs)
        found = [self._factors(target, expert, inputs) for expert in self._inputs.experts]
        factors = [factor for factor in found if factor is not None]
        digests = tuple(inputs.get(label, "") for label in self._labels)

        def merge(stream: DeviceStream) -> tuple[LowRank, TensorContext]:
            context = TensorContext(target.name, digests, self._labels, finite=True, cache=shared.cache)
            there = [LowRank(stream.to_device(factor.B), stream.to_device(factor.A)) for factor in factors]
            merged = merge_factors(chosen, parameters, there, target, self._inputs.weights, context)
            return LowRank(stream.to_host(merged.B), stream.to_host(merged.A)), context

        merged, context = self._on_device(merge, shared, whole_matrix=True)
        if tensor.whole is not None:
            factor = stored_factor(merged, tensor).reshape(-1)
            return self._written(factor, None, tensor, shared, context, slot, out)
        flat = origin.reshape(-1) if origin is not None else None
        return self._written(merged.dense().reshape(-1), flat, tensor, shared, context, slot, out)

    def _factors(self, tensor: TensorPlan, expert: Expert, digests: dict[str, str]) -> LowRank | None:
        """An expert's low-rank delta in float64; its digest is that of the stored factors' bytes, B's then A's."""
        hasher = blake3()

        def read(name: str) -> Tensor:
            info = expert.checkpoint.tensors[name]
            values = self._reader.read(expert.checkpoint, name, 0, info.elements, hasher).double().reshape(info.shape)
            require_finite(values, tensor.name, expert.label, expert.checkpoint, name)
            digests[expert.label] = hasher.hexdigest()
            return values

        return factors_of(tensor.name, tensor.shape, expert, read)

    def _written(
        self,
        delta: Tensor,
        flat: Tensor | None,
        tensor: TensorPlan,
        shared: _Shared,
        context: TensorContext,
        slot: Slot,
        out: Target,
    ) -> TensorRecord:
        """Add a whole tensor's delta to the base's `flat`, round and write it."""
        self._reader.check_stop()
        writer = TensorWriter(tensor, slot, out)
        for start in range(0, tensor.elements, CHUNK):
            part = delta[start : start + CHUNK]
            if flat is None:
                writer.weights(part, start)
            else:
                writer.delta(part, part + flat[start : start + CHUNK], start)
        return writer.record(shared.inputs, to_plain(context.diagnostics), shared.fallback)


@dataclass
class _TensorChunks:
    """A tensor of all models as a statistics pass sees it; the first pass checks its values and hashes its bytes."""

    tensor: TensorPlan
    base: Checkpoint | None
    reader: Reader
    hashers: Hashers
    _begun: bool = False
    _whole: bool = False

    @property
    def elements(self) -> int:
        """Entries of the tensor in one model."""
        return self.tensor.elements

    def passes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The chunks, in order."""
        first, self._begun = not self._begun, True
        for start, count in self.reader.pieces(self.tensor.elements):
            hashers = self.hashers if first else None
            yield self.reader.chunk_of(self.tensor, self.base, start, count, hashers=hashers, check=first)
        self._whole = True

    def require_whole(self) -> None:
        """Raise MergeError unless a pass has seen the whole tensor: its digests and the check rest on it."""
        if not self._whole:
            raise MergeError(
                f"the statistics pass of {self.tensor.method} has not read the whole tensor",
                where=self.tensor.name,
                hint="this is a defect of the method: its `collect` has to finish one of `chunks.passes()`",
            )

    def sample(self) -> Tensor:
        """WorkerJob vectors (or weights) in blocks that are spread evenly."""
        blocks = []
        for start in sample_starts(self.tensor.elements):
            count = min(SAMPLE_BLOCK, self.tensor.elements - start)
            stack, origin = self.reader.chunk_of(self.tensor, self.base, start, count, hashers=None, check=False)
            blocks.append(stack - origin if origin.numel() else stack.clone())
        return torch.cat(blocks, dim=1)


def _hexdigests(hashers: Hashers) -> dict[str, str]:
    return {label: hasher.hexdigest() for label, hasher in hashers.items()}


def _ahead(items: Iterator[R]) -> Iterator[R]:
    """The items, each once the next has been begun."""
    waiting: list[R] = []
    for item in items:
        if waiting:
            yield waiting.pop()
        waiting.append(item)
    yield from waiting
