"""A share of a merge, made by another process: what it is told, what it does, and how its failure comes back whole."""

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
from modelweld.engine.executors.threads import make_in_threads
from modelweld.engine.output.journal import Finished
from modelweld.engine.output.shards import Output
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import Plan

Made = list[tuple[int, Finished]]


@dataclass(frozen=True)
class Task:
    """What all helpers are told: the plans, their directories, what of them is there, and the inputs.

    Pickled, the inputs are opened again where the task lands.
    """

    candidates: tuple[tuple[Plan, Path], ...]
    inputs: Inputs
    finished: tuple[Mapping[str, Finished], ...]

    @classmethod
    def of(cls, outputs: Sequence[Output], inputs: Inputs) -> Task:
        """The task of filling what these outputs lack."""
        # A helper may work in another directory.
        candidates = tuple((output.plan, output.directory.absolute()) for output in outputs)
        return cls(candidates, inputs, tuple(dict(output.finished) for output in outputs))


@dataclass(frozen=True)
class Share:
    """One helper's part: tensors by name, made on one device, journalled in a file of its own."""

    names: frozenset[str]
    device: torch.device
    threads: int
    memory_limit: int | None
    journal: str


class Leader(Protocol):
    """Who is told how far a share is; called from several threads."""

    def advance(self, size_bytes: int) -> None:
        """More input has been read."""

    def made(self, tensor: str, entries: Made) -> None:
        """A tensor is written and journalled: its record for each plan that lacked it, by the plan's number."""


def make_share(task: Task, share: Share, leader: Leader, *, sync: bool = False) -> None:
    """Make the share's tensors; with `sync`, what was written is on the disk at the end."""
    with contextlib.ExitStack() as stack:
        for checkpoint in (task.inputs.reference, *(expert.checkpoint for expert in task.inputs.experts)):
            stack.enter_context(checkpoint)
        stack.enter_context(disk_errors(task.candidates[0][1]))
        outputs = [
            Output.joined(plan, directory, finished, share.journal, stack)
            for (plan, directory), finished in zip(task.candidates, task.finished, strict=True)
        ]
        make_in_threads(
            outputs,
            task.inputs,
            [tensor for tensor in task.candidates[0][0].tensors if tensor.name in share.names],
            device=share.device,
            threads=share.threads,
            memory_limit=share.memory_limit,
            watcher=_Relay(leader, outputs, task.finished),
        )
        if sync:
            for output in outputs:
                for file in {output.slots[name].file for name in share.names}:
                    output.shards[file].sync()


class _Relay:
    """A watcher that hands the records of finished tensors on."""

    def __init__(self, leader: Leader, outputs: Sequence[Output], before: Sequence[Mapping[str, Finished]]) -> None:
        self._outputs, self._before = outputs, before
        self._leader = leader

    def begin(self, size_bytes: int, tensors: int) -> None:
        """The leader knows."""

    def advance(self, size_bytes: int) -> None:
        """More input has been read."""
        self._leader.advance(size_bytes)

    def finished(self, tensor: str) -> None:
        """A tensor is written."""
        pairs = enumerate(zip(self._outputs, self._before, strict=True))
        self._leader.made(tensor, [(k, output.finished[tensor]) for k, (output, had) in pairs if tensor not in had])


@dataclass(frozen=True)
class Failure:
    """An error on its way from one process to another."""

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

    def again(self) -> NoReturn:
        """Raise the error here; where it came from stands in its cause."""
        raise self.error from _Elsewhere(self.trace)


class _Elsewhere(Exception):
    """The traceback of another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
