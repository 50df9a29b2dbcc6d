"""One output tensor from the models' bytes to its own: read, check, merge, round, digest, write.

Element-wise methods, TIES and copies run in chunks that stay in a core's cache: every byte is read, hashed, merged and
written while it is there. Other methods get the whole tensor. Either way a tensor is one thread's work, in order, so
that its bytes, digest and statistics do not depend on how many threads there are.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from blake3 import blake3
from torch import Tensor

from modelweld.checkpoints import Checkpoint
from modelweld.checkpoints.buffers import bytes_of
from modelweld.checkpoints.shards import Slot
from modelweld.config.methods import MethodParameters, Ties
from modelweld.errors import CheckpointError, MergeError
from modelweld.merging.engine.adapters import factors_of, merge_factors, stored_factor
from modelweld.merging.engine.inputs import Expert, Inputs
from modelweld.merging.engine.journal import Finished
from modelweld.merging.engine.packing import merge_packed
from modelweld.merging.engine.plan import TensorPlan, dtype_name
from modelweld.merging.engine.trimming import SAMPLE_BLOCK, majority, merge_chunk, sample_starts, trim_thresholds
from modelweld.merging.low_rank import LowRank
from modelweld.merging.registry import TensorContext, method

_CACHE = 1 << 21  # bytes that a thread's chunk of all models may take: a core's second-level cache
_SCRATCH = 4  # rows beside the experts': the base, the result, and two on the way
CHUNK = 1 << 16  # elements of the final pass over a whole tensor
_DEVICE_CHUNK = 1 << 24  # elements: an accelerator wants fewer, larger pieces
_READ = 1 << 22  # bytes of one read of a whole tensor

BASE = "base"

Hashers: TypeAlias = "dict[str, blake3]"


class Target(Protocol):
    """Where a tensor's bytes go: a shard on disk, or memory."""

    def write(self, slot: Slot, start: int, data: memoryview) -> None:
        """Put bytes at `start` of the slot."""


class Cancelled(Exception):
    """Another thread has met an error: this one was asked to stop between two chunks."""


@dataclass
class Rounding:
    """Squared norms of the merged delta and of what the output's dtype took from the result."""

    delta: float = 0.0
    lost: float = 0.0

    def add(self, delta: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Count one chunk (all three flat); `exact` is overwritten."""
        self.delta += float(torch.dot(delta, delta))
        if rounded.dtype.itemsize < exact.dtype.itemsize:
            difference = exact.sub_(rounded)
            self.lost += float(torch.dot(difference, difference))

    @property
    def survival(self) -> float:
        """1 - ‖rounded - exact‖ / ‖delta‖, at least 0; 1 where there was no delta to lose."""
        return max(0.0, 1.0 - math.sqrt(self.lost / self.delta)) if self.delta else 1.0


def chunk_elements(experts: int) -> int:
    """How many elements of each model are worked on at once: what stays in a core's cache, a power of two.

    Measured with three models: 64 K elements run 2-4 times faster than 256 K, and those than 4 M.
    """
    fitting = _CACHE // (4 * (experts + _SCRATCH))
    return min(1 << 17, max(1 << 14, 1 << (fitting.bit_length() - 1)))


@dataclass
class _Shared:
    """A whole tensor's inputs as they were read, their digests, and what a method keeps for other parameters."""

    origin: Tensor | None = None
    stack: Tensor | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    kept: dict[Hashable, Any] = field(default_factory=dict)


class Worker:
    """What one thread needs to make tensors: its buffers, used again for each, and the way to the inputs."""

    def __init__(
        self, inputs: Inputs, device: torch.device, stop: threading.Event, advance: Callable[[int], None]
    ) -> None:
        self._inputs = inputs
        self._labels = tuple(expert.label for expert in inputs.experts)
        self._device = device
        self._stop = stop
        self._advance = advance
        self._chunk = chunk_elements(len(inputs.experts)) if device.type == "cpu" else _DEVICE_CHUNK
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._shared: _Shared | None = None

    @contextlib.contextmanager
    def sharing(self, wanted: bool) -> Iterator[None]:
        """While it lasts, what one tensor's inputs and joint basis take is kept for making that tensor again."""
        self._shared = _Shared() if wanted else None
        try:
            yield
        finally:
            self._shared = None

    def make(self, tensor: TensorPlan, slot: Slot, out: Target) -> Finished:
        """Write one tensor into its slot.

        Raises CheckpointError naming tensor and model for values that are not finite, MergeError from the method.
        """
        if tensor.parameters is None:
            return self._copy(tensor, slot, out)
        if tensor.route == "factors":
            return self._from_factors(tensor, tensor.parameters, slot, out)
        # An accelerator has its own exact selection over whole tensors, without a wait for the host.
        whole = not tensor.streamed or (self._device.type != "cpu" and isinstance(tensor.parameters, Ties))
        make = self._whole if whole else self._streamed
        return make(tensor, tensor.parameters, slot, out)

    def _copy(self, tensor: TensorPlan, slot: Slot, out: Target) -> Finished:
        source = self._inputs.reference
        label = BASE if self._inputs.base is not None else self._labels[0]
        read, written = blake3(), blake3()
        for start, count in self._chunks(tensor.elements):
            values = self._read(source, tensor.name, start, count, read)
            if values.is_floating_point():
                self._require_finite(values, tensor.name, label, source, tensor.name)
            self._emit(values.to(tensor.dtype), slot, start, out, written)
        return Finished(tensor.name, written.hexdigest(), {label: read.hexdigest()})

    def _streamed(self, tensor: TensorPlan, parameters: MethodParameters, slot: Slot, out: Target) -> Finished:
        chosen = method(parameters.method)
        base = self._inputs.base if chosen.needs_base else None
        hashers: Hashers = {label: blake3() for label in (*self._labels, BASE)}
        known: dict[str, str] = {}
        combine: Callable[[Tensor, TensorContext], Tensor]
        if isinstance(parameters, Ties):
            combine = self._two_phase(tensor, parameters, hashers, known)
        else:
            # Random streams are keyed by the experts' bytes, which have to be known before the first draw.
            if "seed" in type(parameters).model_fields:
                for stack in self._stacks(tensor, base, hashers):
                    del stack
                known = {label: hasher.hexdigest() for label, hasher in hashers.items()}

            def combine(stack: Tensor, context: TensorContext) -> Tensor:
                return chosen.merge(stack.to(self._device), parameters, self._inputs.weights, context=context).cpu()

        written, rounding = blake3(), Rounding()
        digests = tuple(known[label] for label in self._labels) if known else ()
        for start, count in self._chunks(tensor.elements):
            stack, origin = self._deltas(tensor, base, start, count, None if known else hashers)
            merged = combine(stack, TensorContext(tensor.name, digests, self._labels, origin, start, finite=True))
            exact = merged if origin is None else origin.add_(merged)
            self._finish(merged, exact, origin is not None, tensor, slot, start, out, written, rounding)
        inputs = known or {label: hasher.hexdigest() for label, hasher in hashers.items()}
        if base is None:
            inputs = {label: inputs[label] for label in self._labels}
            return Finished(tensor.name, written.hexdigest(), inputs)
        return Finished(tensor.name, written.hexdigest(), inputs, math.sqrt(rounding.delta), rounding.survival)

    def _two_phase(
        self, tensor: TensorPlan, parameters: Ties, hashers: Hashers, known: dict[str, str]
    ) -> Callable[[Tensor, TensorContext], Tensor]:
        """TIES of a chunk, once thresholds and majority of the whole tensor are known; fills in the inputs' digests."""
        base = self._inputs.base

        def passes() -> Iterator[Tensor]:
            yield from self._stacks(tensor, base, None if known else hashers)
            known.update((label, hasher.hexdigest()) for label, hasher in hashers.items())

        blocks = []
        for start in sample_starts(tensor.elements):
            count = min(SAMPLE_BLOCK, tensor.elements - start)
            blocks.append(self._deltas(tensor, base, start, count, None)[0].clone())
        sample = torch.cat(blocks, dim=1)  # (N, s)
        thresholds = trim_thresholds(passes, sample, tensor.elements, parameters.density)
        vote = majority(passes, thresholds)
        return lambda stack, _: merge_chunk(stack, parameters, self._inputs.weights, thresholds, vote)

    def _stacks(self, tensor: TensorPlan, base: Checkpoint | None, hashers: Hashers | None) -> Iterator[Tensor]:
        """Every chunk's stack `(N, n)`, valid until the next."""
        for start, count in self._chunks(tensor.elements):
            yield self._deltas(tensor, base, start, count, hashers)[0]

    def _deltas(
        self, tensor: TensorPlan, base: Checkpoint | None, start: int, count: int, hashers: Hashers | None
    ) -> tuple[Tensor, Tensor | None]:
        """A chunk of all experts `(N, count)`, less the base when there is one, and the base's chunk.

        Both are this worker's buffers. Values are checked for NaN and infinities on the pass that hashes them.
        """
        experts = self._inputs.experts
        stack = self._buffer("experts", tensor.work_dtype, len(experts), count)
        origin = None
        if base is not None:
            origin = self._buffer("base", tensor.work_dtype, 1, count)[0]
            origin.copy_(self._read(base, tensor.name, start, count, hashers[BASE] if hashers else None))
            if hashers:
                self._require_finite(origin, tensor.name, BASE, base, tensor.name)
        for index, (expert, stored) in enumerate(zip(experts, tensor.stored, strict=True)):
            hasher = hashers[expert.label] if hashers else None
            stack[index].copy_(self._read(expert.checkpoint, stored, start, count, hasher))
        if hashers:
            self._require_finite_stack(stack, tensor)
        if origin is not None:
            stack.sub_(origin)
        return stack, origin

    def _whole(self, tensor: TensorPlan, parameters: MethodParameters, slot: Slot, out: Target) -> Finished:
        chosen, shared = method(parameters.method), self._shared or _Shared()
        if shared.stack is None:
            shared.stack, shared.origin = self._gathered(tensor, parameters, shared.inputs)
        stack, origin, inputs = shared.stack, shared.origin, shared.inputs
        digests = tuple(inputs.get(label, "") for label in self._labels)
        # Apple's GPUs have no float64, which subspace methods need.
        device = torch.device("cpu") if self._device.type == "mps" and chosen.whole_matrix else self._device
        context = TensorContext(tensor.name, digests, self._labels, origin, 0, finite=True, kept=shared.kept)
        merged = merge_packed(chosen, parameters, stack.to(device), tensor, self._inputs.weights, context).cpu()
        del stack, shared
        flat = origin.reshape(-1) if origin is not None and chosen.needs_base else None
        return self._written(merged.reshape(-1), flat, tensor, inputs, slot, out)

    def _gathered(
        self, tensor: TensorPlan, parameters: MethodParameters, inputs: dict[str, str]
    ) -> tuple[Tensor, Tensor | None]:
        """All experts' whole tensors `(N, *shape)`, less the base's where the method wants that, and the base's."""
        chosen, experts = method(parameters.method), self._inputs.experts
        adapted = tensor.route == "densified"
        base = self._inputs.base if chosen.needs_base or chosen.whole_matrix or adapted else None
        origin = self._read_whole(base, tensor.name, BASE, tensor, inputs) if base is not None else None
        stack = torch.empty((len(experts), *tensor.shape), dtype=tensor.work_dtype)  # (N, *shape)
        for index, (expert, stored) in enumerate(zip(experts, tensor.stored, strict=True)):
            factors = self._factors(tensor, expert, inputs) if adapted else None
            if factors is not None:
                stack[index].copy_(factors.dense())
                if origin is not None and not chosen.needs_base:
                    stack[index].add_(origin)
                continue
            stack[index].copy_(self._read_whole(expert.checkpoint, stored, expert.label, tensor, inputs))
            if origin is not None and chosen.needs_base:
                stack[index].sub_(origin)
        return stack, origin

    def _from_factors(self, tensor: TensorPlan, parameters: MethodParameters, slot: Slot, out: Target) -> Finished:
        """As `_whole`, for a weight that every expert changes by low-rank factors, or not at all."""
        chosen, target = method(parameters.method), tensor.whole or tensor
        shared = self._shared or _Shared()
        inputs, origin = shared.inputs, shared.origin
        if tensor.whole is None and self._inputs.base is not None and origin is None:
            origin = shared.origin = self._read_whole(self._inputs.base, tensor.name, BASE, tensor, inputs)
        device = torch.device("cpu") if self._device.type == "mps" else self._device
        factors = []
        for expert in self._inputs.experts:
            found = self._factors(target, expert, inputs)
            if found is not None:
                factors.append(LowRank(found.B.to(device), found.A.to(device)))
        digests = tuple(inputs.get(label, "") for label in self._labels)
        context = TensorContext(target.name, digests, self._labels, origin, 0, finite=True, kept=shared.kept)
        merged = merge_factors(chosen, parameters, factors, target, self._inputs.weights, context)
        merged = LowRank(merged.B.cpu(), merged.A.cpu())
        if tensor.whole is not None:
            return self._written(stored_factor(merged, tensor).reshape(-1), None, tensor, inputs, slot, out)
        flat = origin.reshape(-1) if origin is not None else None
        return self._written(merged.dense().reshape(-1), flat, tensor, inputs, slot, out)

    def _factors(self, tensor: TensorPlan, expert: Expert, digests: dict[str, str]) -> LowRank | None:
        """An expert's low-rank delta in float64; its digest is that of the stored factors' bytes, B's then A's."""
        hasher = blake3()

        def read(name: str) -> Tensor:
            info = expert.checkpoint.tensors[name]
            values = self._read(expert.checkpoint, name, 0, info.elements, hasher).double().reshape(info.shape)
            self._require_finite(values, tensor.name, expert.label, expert.checkpoint, name)
            digests[expert.label] = hasher.hexdigest()
            return values

        return factors_of(tensor.name, tensor.shape, expert, read)

    def _written(
        self,
        delta: Tensor,
        flat: Tensor | None,
        tensor: TensorPlan,
        inputs: dict[str, str],
        slot: Slot,
        out: Target,
    ) -> Finished:
        """Add a whole tensor's delta to the base's `flat`, round and write it."""
        self._check_stop()
        written, rounding = blake3(), Rounding()
        for start in range(0, tensor.elements, CHUNK):
            part = delta[start : start + CHUNK]
            exact = part if flat is None else part + flat[start : start + CHUNK]
            self._finish(part, exact, flat is not None, tensor, slot, start, out, written, rounding)
        if flat is None:
            return Finished(tensor.name, written.hexdigest(), inputs)
        return Finished(tensor.name, written.hexdigest(), inputs, math.sqrt(rounding.delta), rounding.survival)

    def _finish(
        self,
        delta: Tensor,
        exact: Tensor,
        based: bool,
        tensor: TensorPlan,
        slot: Slot,
        start: int,
        out: Target,
        written: blake3,
        rounding: Rounding,
    ) -> None:
        rounded = exact.to(tensor.dtype)
        if tensor.dtype == torch.float16 and not bool(torch.isfinite(rounded).all()):
            raise MergeError("the merge overflows float16", where=tensor.name, mend="output: {dtype: bfloat16}")
        self._emit(rounded, slot, start, out, written)
        if based:
            rounding.add(delta, exact, rounded)

    def _chunks(self, elements: int) -> list[tuple[int, int]]:
        step = self._chunk
        return [(start, min(step, elements - start)) for start in range(0, elements, step)]

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Cancelled

    def _read(self, source: Checkpoint, name: str, start: int, count: int, hasher: blake3 | None) -> Tensor:
        """`count` elements from `start`, in this worker's buffer: valid until the next read."""
        self._check_stop()
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

    def _read_whole(
        self, source: Checkpoint, name: str, label: str, tensor: TensorPlan, digests: dict[str, str]
    ) -> Tensor:
        info, hasher = source.tensors[name], blake3()
        values = torch.empty(info.elements, dtype=tensor.work_dtype)
        step = _READ // info.dtype.itemsize
        for start in range(0, info.elements, step):
            part = values[start : start + step]
            part.copy_(self._read(source, name, start, part.numel(), hasher))
            self._require_finite(part, tensor.name, label, source, name)
        digests[label] = hasher.hexdigest()
        return values.reshape(tensor.shape)

    def _buffer(self, use: str, dtype: torch.dtype, rows: int, count: int) -> Tensor:
        key, size = (use, dtype), rows * self._chunk
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=dtype)
        return self._buffers[key][: rows * count].view(rows, count)  # (rows, count)

    def _emit(self, values: Tensor, slot: Slot, start: int, out: Target, hasher: blake3) -> None:
        if values.numel():
            view = bytes_of(values.contiguous())
            hasher.update(view)
            out.write(slot, start * values.dtype.itemsize, view)

    def _require_finite_stack(self, stack: Tensor, tensor: TensorPlan) -> None:
        # A sum is the cheapest look; it may overflow where no entry is infinite, so its word is checked.
        if math.isfinite(float(stack.sum())):
            return
        for row, expert, stored in zip(stack, self._inputs.experts, tensor.stored, strict=True):
            self._require_finite(row, tensor.name, expert.label, expert.checkpoint, stored)

    def _require_finite(self, values: Tensor, name: str, label: str, source: Checkpoint, stored: str) -> None:
        wide = values if values.dtype.itemsize >= 4 else values.float()
        if math.isfinite(float(wide.sum())) or bool(torch.isfinite(wide).all()):
            return
        kind = "NaN" if bool(torch.isnan(wide).any()) else "infinite values"
        raise CheckpointError(
            f"{label} holds {kind} in tensor {name!r} ({dtype_name(values.dtype)})",
            where=source.place(stored),
            mend="mend or leave out this model; merging cannot heal it",
        )
