"""One process a device: each makes a fixed share of the tensors, this one listens, and no failure of theirs is lost.

Helpers are started afresh (torch's threads do not survive a fork), open the inputs themselves and write into the shards
that lie there already. They may be stopped at any point: what they have journalled is on its way to the disk.
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
from modelweld.engine.executors.job import Failure, Made, Share, Task, make_share
from modelweld.engine.executors.partition import shares
from modelweld.engine.output.shards import Output
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import TensorPlan
from modelweld.engine.progress import Watcher
from modelweld.errors import ExternalError

if TYPE_CHECKING:
    from types import TracebackType

_TELL_S = 0.1  # a helper says at most this often how much it has read
_GRACE_S = 5.0  # for a helper to die of SIGTERM before it gets SIGKILL


def make_in_processes(
    outputs: Sequence[Output],
    inputs: Inputs,
    pending: Sequence[TensorPlan],
    devices: Sequence[torch.device],
    threads: int,
    memory_limit: int | None,
    watcher: Watcher,
) -> int:
    """Make the pending tensors in one process a device, each with so many threads; their peaks of memory, in bytes.

    The first error of any stops the others and is raised here; ExternalError when one dies without a word.
    """
    parts = shares(pending, len(inputs.experts), len(devices))
    told = pickle.dumps(Task.of(outputs, inputs))
    with contextlib.ExitStack() as stack:
        helpers = []
        for number, (part, device) in enumerate(zip(parts, devices, strict=False), 1):
            names = frozenset(tensor.name for tensor in part)
            share = Share(names, device, threads, memory_limit, f"journal.{number}")
            helpers.append(stack.enter_context(_Helper(number, share)))
        for helper in helpers:
            helper.send(told)
        return _listen(helpers, outputs, watcher)


@dataclass(frozen=True)
class _Read:
    """A helper has read so much more."""

    size_bytes: int


@dataclass(frozen=True)
class _Made:
    """A helper has written and journalled a tensor."""

    tensor: str
    entries: Made


@dataclass(frozen=True)
class _Done:
    """A helper's share is made; the memory it took at its peak."""

    peak_bytes: int


_Said = _Read | _Made | _Done | Failure


def _listen(helpers: Sequence[_Helper], outputs: Sequence[Output], watcher: Watcher) -> int:
    """Pass on what the helpers say until all are done."""
    working, peak = {helper.connection: helper for helper in helpers}, 0
    while working:
        for ready in connection.wait(list(working)):
            helper = working[ready]  # type: ignore[index]
            match helper.heard():
                case _Read(size_bytes):
                    watcher.advance(size_bytes)
                case _Made(tensor, entries):
                    for number, entry in entries:
                        outputs[number].record(entry)
                    watcher.finished(tensor)
                case _Done(peak_bytes):
                    peak += peak_bytes
                    del working[helper.connection]
                case Failure() as failure:
                    failure.again()
    return peak


class _Helper:
    """One process and the way to it; gone when the context is left, whatever it was doing."""

    def __init__(self, number: int, share: Share) -> None:
        self._number, self._device = number, share.device
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=_help, args=(theirs, share), name=f"modelweld-merge-{number}", daemon=True
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
        """Tell it what to do."""
        try:
            self.connection.send_bytes(task)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def heard(self) -> _Said:
        """What it says next; raises ExternalError when it has died."""
        try:
            said: _Said = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error
        return said

    def __enter__(self) -> _Helper:
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
            f"the process on {self._device} {how} before its share was done",
            where=f"process {self._number} of the merge",
            hint=hint,
        )


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all: stopping them is their leader's."""
    # It is started with the first process otherwise, and then lets interrupts in again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _help(leader: Connection, share: Share) -> None:
    """A helper's whole life."""
    threading.Thread(target=_leave_with_leader, name="modelweld-leader", daemon=True).start()
    with _Told(leader):
        task: Task = pickle.loads(leader.recv_bytes())  # noqa: S301 - from the process that started this one
        if share.device.index is not None and share.device.type == "cuda":
            torch.cuda.set_device(share.device)
        teller = _Teller(leader)
        make_share(task, share, teller)
        teller.done()


def _leave_with_leader() -> None:
    """End this process when its leader is gone, however that ended: nobody would hear it."""
    leader = parent_process()
    if leader is not None:
        leader.join()
    os._exit(1)


class _Told:
    """A context whose errors go to the leader instead of to the terminal."""

    def __init__(self, leader: Connection) -> None:
        self._leader = leader

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody is left to hear it
            self._leader.send(Failure.of(error))
        return True


class _Teller:
    """Tells the leader how far a share is: tensors at once, bytes now and then."""

    def __init__(self, leader: Connection) -> None:
        self._leader = leader
        self._lock = threading.Lock()
        self._unsaid, self._last = 0, time.monotonic()

    def advance(self, size_bytes: int) -> None:
        """More input has been read."""
        with self._lock:
            self._unsaid += size_bytes
            if time.monotonic() - self._last >= _TELL_S:
                self._say_bytes()

    def made(self, tensor: str, entries: Made) -> None:
        """A tensor is written and journalled."""
        with self._lock:
            self._say_bytes()
            self._leader.send(_Made(tensor, entries))

    def done(self) -> None:
        """The share is made."""
        with self._lock:
            self._say_bytes()
            self._leader.send(_Done(peak_resident()))

    def _say_bytes(self) -> None:
        if self._unsaid:
            self._leader.send(_Read(self._unsaid))
        self._unsaid, self._last = 0, time.monotonic()
