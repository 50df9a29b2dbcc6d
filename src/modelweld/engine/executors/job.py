"""A partition of a merge that another process makes: its description, the work itself, and how its error comes back."""

from __future__ import annotations

import contextlib
import pickle
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import torch

from modelweld.checkpoints.shards import disk_errors
from modelweld.engine.executors.threads import run_in_threads
from modelweld.engine.output.journal import TensorRecord
from modelweld.engine.output.shards import Output
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import Plan

Made = list[tuple[int, TensorRecord]]


@dataclass(frozen=True)
class WorkerJob:
    """What every worker gets: the plans, their directories, what is finished, and the inputs.

    The inputs are pickled by path and opened again in the worker.
    """

    candidates: tuple[tuple[Plan, Path], ...]
    inputs: Inputs
    finished: tuple[Mapping[str, TensorRecord], ...]

    @classmethod
    def of(cls, outputs: Sequence[Output], inputs: Inputs) -> WorkerJob:
        """The job of completing these outputs."""
        # A worker may work in another directory.
        candidates = tuple((output.plan, output.directory.absolute()) for output in outputs)
        return cls(candidates, inputs, tuple(dict(output.finished) for output in outputs))


@dataclass(frozen=True)
class Partition:
    """One worker's part: tensors by name, merged on one device, with a journal of its own."""

    names: frozenset[str]
    device: torch.device
    threads: int
    memory_limit: int | None
    journal: str


class Coordinator(Protocol):
    """What a worker reports to; called from several threads."""

    def advance(self, size_bytes: int) -> None:
        """More input has been read."""

    def made(self, tensor: str, entries: Made) -> None:
        """A tensor is written and journalled: its record for each plan that lacked it, by the plan's number."""


def run_partition(task: WorkerJob, share: Partition, coordinator: Coordinator, *, sync: bool = False) -> None:
    """Merge the partition's tensors; with `sync`, the written bytes are synced to disk at the end."""
    with contextlib.ExitStack() as stack:
        for checkpoint in (task.inputs.reference, *(expert.checkpoint for expert in task.inputs.experts)):
            stack.enter_context(checkpoint)
        stack.enter_context(disk_errors(task.candidates[0][1]))
        outputs = [
            Output.joined(plan, directory, finished, share.journal, stack)
            for (plan, directory), finished in zip(task.candidates, task.finished, strict=True)
        ]
        run_in_threads(
            outputs,
            task.inputs,
            [tensor for tensor in task.candidates[0][0].tensors if tensor.name in share.names],
            device=share.device,
            threads=share.threads,
            memory_limit=share.memory_limit,
            progress=_Relay(coordinator, outputs, task.finished),
        )
        if sync:
            for output in outputs:
                for file in {output.slots[name].file for name in share.names}:
                    output.shards[file].sync()


class _Relay:
    """Progress that forwards the records of finished tensors to the coordinator."""

    def __init__(
        self, coordinator: Coordinator, outputs: Sequence[Output], before: Sequence[Mapping[str, TensorRecord]]
    ) -> None:
        self._outputs, self._before = outputs, before
        self._coordinator = coordinator

    def begin(self, size_bytes: int, tensors: int) -> None:
        """The coordinator knows the totals."""

    def advance(self, size_bytes: int) -> None:
        """More input has been read."""
        self._coordinator.advance(size_bytes)

    def finished(self, tensor: str) -> None:
        """A tensor is written."""
        pairs = enumerate(zip(self._outputs, self._before, strict=True))
        self._coordinator.made(
            tensor, [(k, output.finished[tensor]) for k, (output, had) in pairs if tensor not in had]
        )


@dataclass(frozen=True)
class Failure:
    """An error that is sent from one process to another."""

    error: Exception
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The error as it is, or as a RuntimeError that says the same where it cannot be pickled."""
        trace = "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        except (pickle.PicklingError, TypeError, AttributeError):
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(error, trace)

    def reraise(self) -> NoReturn:
        """Raise the error here, with the other process's traceback as its cause."""
        raise self.error from RemoteTraceback(self.trace)


class RemoteTraceback(Exception):
    """The traceback of another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
