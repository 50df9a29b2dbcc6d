"""One process per device: each merges a fixed partition; the coordinator collects progress and re-raises errors.

Workers are spawned (torch's threads do not survive a fork), open the inputs themselves and write into the shards that
are laid out already. They may be stopped at any point: what they have journalled is written.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING

import torch

from modelweld.engine.cost.memory import peak_resident
from modelweld.engine.executors.job import Failure, Made, Partition, WorkerJob, run_partition
from modelweld.engine.executors.partition import partition
from modelweld.engine.output.shards import Output
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import TensorPlan
from modelweld.engine.progress import Progress
from modelweld.errors import ExternalError

if TYPE_CHECKING:
    from types import TracebackType

_REPORT_S = 0.1  # a worker says at most this often how much it has read
_GRACE_S = 5.0  # for a worker to die of SIGTERM before it gets SIGKILL


def run_in_processes(
    outputs: Sequence[Output],
    inputs: Inputs,
    pending: Sequence[TensorPlan],
    devices: Sequence[torch.device],
    threads: int,
    memory_limit: int | None,
    progress: Progress,
) -> int:
    """Merge the pending tensors, one process per device, each with `threads` threads; returns their summed peaks.

    The first error stops the other processes and is raised here; ExternalError when a worker exits without an error.
    """
    parts = partition(pending, len(inputs.experts), len(devices))
    payload = pickle.dumps(WorkerJob.of(outputs, inputs))
    with contextlib.ExitStack() as stack:
        workers = []
        for number, (part, device) in enumerate(zip(parts, devices, strict=False), 1):
            names = frozenset(tensor.name for tensor in part)
            share = Partition(names, device, threads, memory_limit, f"journal.{number}")
            workers.append(stack.enter_context(_WorkerProcess(number, share)))
        for worker in workers:
            worker.send(payload)
        return _pump(workers, outputs, progress)


@dataclass(frozen=True)
class _Read:
    """A worker has read so much more."""

    size_bytes: int


@dataclass(frozen=True)
class _Made:
    """A worker has written and journalled a tensor."""

    tensor: str
    entries: Made


@dataclass(frozen=True)
class _Done:
    """A worker has finished; its peak memory."""

    peak_bytes: int


_Message = _Read | _Made | _Done | Failure


def _pump(workers: Sequence[_WorkerProcess], outputs: Sequence[Output], progress: Progress) -> int:
    """Forward the workers' messages until all are done."""
    working, peak = {worker.connection: worker for worker in workers}, 0
    while working:
        for ready in connection.wait(list(working)):
            worker = working[ready]  # type: ignore[index]
            match worker.recv():
                case _Read(size_bytes):
                    progress.advance(size_bytes)
                case _Made(tensor, entries):
                    for number, entry in entries:
                        outputs[number].record(entry)
                    progress.finished(tensor)
                case _Done(peak_bytes):
                    peak += peak_bytes
                    del working[worker.connection]
                case Failure() as failure:
                    failure.reraise()
    return peak


class _WorkerProcess:
    """One worker process and the connection to it; ended when the context is left."""

    def __init__(self, number: int, share: Partition) -> None:
        self._number, self._device = number, share.device
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=_worker_main, args=(theirs, share), name=f"modelweld-merge-{number}", daemon=True
        )
        try:
            with _interrupts_held():
                self._process.start()
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()

    def send(self, task: bytes) -> None:
        """Send it its job."""
        try:
            self.connection.send_bytes(task)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def recv(self) -> _Message:
        """Its next message; raises ExternalError when it has exited."""
        try:
            message: _Message = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error
        return message

    def __enter__(self) -> _WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.terminate()
        self._process.join(_GRACE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self.connection.close()

    def _died(self) -> ExternalError:
        self._process.join(_GRACE_S)
        code = self._process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        hint = "run the same command again: what was finished is kept"
        if code == -signal.SIGKILL:
            hint = f"if memory ran out, use fewer processes or a --memory-limit; {hint}"
        elif code == 1:
            hint = f"a script that merges in several processes needs `if __name__ == '__main__':`; {hint}"
        return ExternalError(
            f"the process on {self._device} {how} before its partition was finished",
            where=f"process {self._number} of the merge",
            hint=hint,
        )


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which a terminal sends to all: the coordinator stops them."""
    # It is started with the first process otherwise, and then lets interrupts in again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_main(coordinator: Connection, share: Partition) -> None:
    """The main function of a worker process."""
    threading.Thread(target=_exit_with_coordinator, name="modelweld-coordinator", daemon=True).start()
    with _ForwardErrors(coordinator):
        task: WorkerJob = pickle.loads(coordinator.recv_bytes())  # noqa: S301 - from the process that started this one
        if share.device.index is not None and share.device.type == "cuda":
            torch.cuda.set_device(share.device)
        teller = _ProgressReporter(coordinator)
        run_partition(task, share, teller)
        teller.done()


def _exit_with_coordinator() -> None:
    """End this process when the coordinator has ended: no coordinator is left to receive its messages."""
    coordinator = parent_process()
    if coordinator is not None:
        coordinator.join()
    os._exit(1)


class _ForwardErrors:
    """A context whose errors are sent to the coordinator instead of being printed."""

    def __init__(self, coordinator: Connection) -> None:
        self._coordinator = coordinator

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # no coordinator is left to receive it
            self._coordinator.send(Failure.of(error))
        return True


class _ProgressReporter:
    """Reports a worker's progress to the coordinator: tensors at once, bytes at intervals."""

    def __init__(self, coordinator: Connection) -> None:
        self._coordinator = coordinator
        self._lock = threading.Lock()
        self._unreported, self._last = 0, time.monotonic()

    def advance(self, size_bytes: int) -> None:
        """More input has been read."""
        with self._lock:
            self._unreported += size_bytes
            if time.monotonic() - self._last >= _REPORT_S:
                self._report_bytes()

    def made(self, tensor: str, entries: Made) -> None:
        """A tensor is written and journalled."""
        with self._lock:
            self._report_bytes()
            self._coordinator.send(_Made(tensor, entries))

    def done(self) -> None:
        """The partition is finished."""
        with self._lock:
            self._report_bytes()
            self._coordinator.send(_Done(peak_resident()))

    def _report_bytes(self) -> None:
        if self._unreported:
            self._coordinator.send(_Read(self._unreported))
        self._unreported, self._last = 0, time.monotonic()
