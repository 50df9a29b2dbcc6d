"""What a plan will cost: floating-point operations, memory, and time from a short look at this very machine."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from modelweld.checkpoints.buffers import bytes_of
from modelweld.config.methods import MethodParameters
from modelweld.engine.cost.memory import room, working_bytes
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import Plan, TensorPlan
from modelweld.engine.run.chunks import in_host_memory
from modelweld.engine.run.worker import chunk_elements
from modelweld.methods.method import TensorContext
from modelweld.methods.numerics.work import Work
from modelweld.methods.registry import method

_TRIAL_S = 0.25
_GEMM = 512
_EIGH = 256
_MATRIX = 256
_WRITE_TRIAL_BYTES = 32 << 20
_READ_TRIAL_BYTES = 64 << 20
_READ_BLOCK = 1 << 18


@dataclass(frozen=True)
class Rates:
    """Measured here, one thread: bytes and operations a second, and entries a second by method."""

    read: float
    write: float
    gemm: float
    eigh: float
    entries: dict[MethodParameters, float]


def flops(tensor: TensorPlan, experts: int) -> float:
    """Floating-point operations of one tensor, counted by formula."""
    if tensor.parameters is None:
        return 0.0
    if tensor.route == "factors":
        return factor_work(tensor, experts).total
    dense = tensor.elements * 2.0 * sum(tensor.ranks)  # of factors made dense
    if method(tensor.parameters.method).whole_matrix:
        return dense + matrix_work(tensor, experts).total
    return dense + tensor.elements * (2.0 * experts + 2)


def matrix_work(tensor: TensorPlan, experts: int) -> Work:
    """The operations on a dense weight of a method that takes whole matrices, over its parts."""
    total = Work(0.0, 0.0, 0.0)
    if tensor.parameters is not None:
        for n, m in _parts(tensor, *tensor.shape):
            total += method(tensor.parameters.method).matrix_work(tensor.parameters, experts, n, m)
    return total


def factor_work(tensor: TensorPlan, experts: int) -> Work:
    """As `matrix_work` for factors (n, R) and (R, m), R all experts' ranks together, and adding the result to the base.

    Methods that do not take whole matrices join the factors as they are. An adapter that stays one is never multiplied
    out.
    """
    whole = tensor.whole or tensor
    rows, columns = whole.shape
    rank, total = sum(tensor.ranks), Work(0.0, 0.0, 0.0)
    parts = _parts(tensor, rows, columns)
    chosen = method(tensor.parameters.method) if tensor.parameters is not None else None
    if chosen is not None and chosen.whole_matrix:
        for n, m in parts:
            total += chosen.factor_work(tensor.parameters, experts, rank, n, m)
    if tensor.whole is None:
        total += Work(2.0 * rows * columns * rank * len(parts), 0.0, float(rows * columns))
    return total


def _parts(tensor: TensorPlan, rows: int, columns: int) -> list[tuple[int, int]]:
    """(out, in) of every packed projection."""
    out, inner = (columns, rows) if tensor.transposed else (rows, columns)
    sizes = [size * tensor.packing.groups for size in tensor.packing.sizes] if tensor.packing else [out]
    return [(size, inner) for size in sizes]


def peak_memory(plan: Plan, experts: int, threads: int, resident: int, limit: int | None, device: str = "cpu") -> int:
    """Bytes at the peak: what is resident now, the buffers of streaming threads, and the largest tensors in work."""
    needs = [working_bytes(tensor, experts, device) for tensor in plan.tensors]
    streams = [tensor.streamed_on(device) for tensor in plan.tensors]
    streaming = [need for need, streamed in zip(needs, streams, strict=True) if streamed]
    whole = [need for need, streamed in zip(needs, streams, strict=True) if not streamed]
    buffers = threads * max(streaming, default=0)
    if not whole:
        return resident + buffers
    together = min(sum(sorted(whole)[-threads:]), limit or room(zip(plan.tensors, needs, strict=True)))
    return resident + buffers + together


def seconds(plan: Plan, experts: int, rates: Rates, threads: int) -> float:
    """Expected wall time with that many threads."""
    compute = 0.0
    for tensor in plan.tensors:
        if tensor.parameters is None:
            continue
        if tensor.route == "factors":
            work = factor_work(tensor, experts)
        elif method(tensor.parameters.method).whole_matrix:
            work = matrix_work(tensor, experts)
        else:
            work = Work(0.0, 0.0, float(tensor.elements))
        made_dense = 2.0 * tensor.elements * sum(tensor.ranks) if tensor.route == "densified" else 0.0
        compute += (work.gemm + made_dense) / rates.gemm + work.eigh / rates.eigh
        compute += work.entries / rates.entries[tensor.parameters]
    read = sum(tensor.read_bytes * (2 if _twice(tensor.parameters) else 1) for tensor in plan.tensors)
    return (read / rates.read + compute) / threads + plan.write_bytes / rates.write


def _twice(parameters: MethodParameters | None) -> bool:
    """Whether a tensor is read once to survey or hash it, and once more to merge it."""
    chosen = method(parameters.method) if parameters else None
    return chosen is not None and (chosen.statistics is not None or chosen.seeded)


def calibrate(plan: Plan, inputs: Inputs, out: Path) -> Rates:
    """Rates of this machine, of these inputs' disk and of the output's, in about two seconds."""
    gemm = 2.0 * _GEMM**3 / _timed(_gemm_trial())
    eigh = 9.0 * _EIGH**3 / _timed(_eigh_trial())
    entries = {}
    for parameters in dict.fromkeys(tensor.parameters for tensor in plan.tensors if tensor.parameters):
        entries[parameters] = _entries(parameters, inputs, gemm, eigh)
    return Rates(_read_rate(inputs), _write_rate(out), gemm, eigh, entries)


def _gemm_trial() -> Callable[[], object]:
    left = torch.ones(_GEMM, _GEMM, dtype=torch.float64)
    return lambda: left @ left


def _eigh_trial() -> Callable[[], object]:
    seeded = torch.randn(_EIGH, _EIGH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    symmetric = seeded @ seeded.T
    return lambda: torch.linalg.eigh(symmetric)


def _entries(parameters: MethodParameters, inputs: Inputs, gemm: float, eigh: float) -> float:
    chosen, experts = method(parameters.method), len(inputs.experts)
    count = chunk_elements(experts)
    shape = (_MATRIX, _MATRIX) if chosen.whole_matrix else (count,)
    stack = torch.randn(experts, *shape, generator=torch.Generator().manual_seed(0))
    labels = tuple(expert.label for expert in inputs.experts)
    context = TensorContext("calibration", labels, labels, finite=True)
    if not chosen.whole_matrix:
        return count / _timed(_chunk_trial(parameters, inputs, stack, context))
    spent = _timed(lambda: chosen.merge(stack, parameters, inputs.weights, context=context))
    work = chosen.matrix_work(parameters, experts, _MATRIX, _MATRIX)
    return work.entries / max(spent - work.gemm / gemm - work.eigh / eigh, 0.1 * spent)


def _chunk_trial(
    parameters: MethodParameters, inputs: Inputs, stack: Tensor, context: TensorContext
) -> Callable[[], object]:
    """A chunk, merged in host memory by a method that depends on the whole tensor through a few numbers at most."""
    passed = method(parameters.method).statistics
    chunks = _OneChunk(stack, torch.zeros(stack.shape[1]))

    def trial() -> object:
        statistics = passed.collect(parameters, chunks) if passed else None
        combine = in_host_memory(parameters, inputs.weights, context, stack.dtype, statistics)
        return combine(stack, chunks.origin, 0)

    return trial


@dataclass(frozen=True)
class _OneChunk:
    """A tensor that is one chunk: the experts' `(N, n)` and the base's `(n,)`."""

    stack: Tensor
    origin: Tensor

    @property
    def elements(self) -> int:
        """Entries of one model."""
        return self.stack.shape[1]

    def passes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The chunk."""
        yield self.stack, self.origin

    def sample(self) -> Tensor:
        """The task vectors at its start."""
        return (self.stack - self.origin)[:, : 1 << 14]


def _timed(trial: Callable[[], object]) -> float:
    trial()
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - started < _TRIAL_S:
        trial()
        rounds += 1
    return (time.perf_counter() - started) / rounds


def _read_rate(inputs: Inputs) -> float:
    """Bytes a second through read, digest and conversion, from the largest tensor of the reference."""
    source = inputs.reference
    info = max(source.tensors.values(), key=lambda entry: entry.nbytes)
    raw, done, hasher = torch.empty(_READ_BLOCK, dtype=torch.uint8), 0, blake3()
    started = time.perf_counter()
    while done < min(info.nbytes, _READ_TRIAL_BYTES) and time.perf_counter() - started < 2 * _TRIAL_S:
        count = min(raw.numel(), info.nbytes - done)
        part = raw[:count]
        source.read_into(info.name, done, bytes_of(part))
        hasher.update(bytes_of(part))
        if info.dtype.is_floating_point:
            part.view(info.dtype).float()
        done += count
    return done / max(time.perf_counter() - started, 1e-9)


def _write_rate(out: Path) -> float:
    """Bytes a second onto the output's disk, synced."""
    block = bytes(1 << 20)
    started, done = time.perf_counter(), 0
    with tempfile.TemporaryFile(dir=existing_parent(out)) as stream:
        while done < _WRITE_TRIAL_BYTES and time.perf_counter() - started < _TRIAL_S:
            stream.write(block)
            done += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    return done / max(time.perf_counter() - started, 1e-9)


def existing_parent(out: Path) -> Path:
    """The nearest directory above `out` that is there already."""
    return next(parent for parent in out.absolute().parents if parent.is_dir())
