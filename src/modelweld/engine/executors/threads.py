"""The threads of one process: each merges the next tensor, on one device, until all are done or one has failed.

Each tensor is prefetched before its turn, so that reading, computing and writing
overlap while only the tensors in work are in memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from modelweld.engine.cost.memory import Budget, working_bytes
from modelweld.engine.output.journal import TensorRecord
from modelweld.engine.output.shards import Output
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import TensorPlan
from modelweld.engine.progress import Progress
from modelweld.engine.run.device_stream import free_on
from modelweld.engine.run.worker import Cancelled, Worker

_HEAP_BLOCK = 31 << 20  # just below glibc's ceiling for that threshold
_READ_AHEAD = 2  # tensors announced to the kernel beyond those in work


def run_in_threads(
    outputs: Sequence[Output],
    inputs: Inputs,
    pending: Sequence[TensorPlan],
    *,
    device: torch.device,
    threads: int,
    memory_limit: int | None,
    progress: Progress,
) -> None:
    """Make the pending tensors in every output that lacks them; the first error of a thread stops the others.

    A weight is made for all outputs in turn, while it is in memory; where they agree on a tensor it is made once and
    copied. The bytes do not depend on `threads`.
    """
    with one_torch_thread():
        _TensorQueue(outputs, inputs, pending, device, memory_limit, progress).work(threads)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """One torch thread per worker: the order of a sum, and so the last bit, must not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # glibc gives fresh pages to every temporary larger than its threshold, and the page faults cost more than the
    # arithmetic; it raises the threshold to the largest block that was ever freed, so free a large one.
    torch.empty(_HEAP_BLOCK, dtype=torch.uint8)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _TensorQueue:
    """What the threads share: the queue of tensors, the memory budget, and the stop event."""

    def __init__(
        self,
        outputs: Sequence[Output],
        inputs: Inputs,
        pending: Sequence[TensorPlan],
        device: torch.device,
        memory_limit: int | None,
        progress: Progress,
    ) -> None:
        self._outputs, self._inputs, self._pending = outputs, inputs, pending
        self._device, self._watcher = device, progress
        self._next = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        tensors = [output.tensors[tensor.name] for tensor in pending for output in outputs]
        needs = [(tensor, self._need(tensor)) for tensor in tensors]
        self._budget = Budget(memory_limit, needs, free_on(device))

    def work(self, threads: int) -> None:
        """Make all pending tensors; the first error of any thread stops the others and is raised."""
        with ThreadPoolExecutor(threads, thread_name_prefix="modelweld-merge") as pool:
            futures = [pool.submit(self._work) for _ in range(min(threads, max(1, len(self._pending))))]
            try:
                # The others stop between two chunks once one has failed, so waiting in order finds the first error.
                errors = [error for future in futures if (error := future.exception()) is not None]
            except BaseException:
                self._stop.set()
                raise
        real = [error for error in errors if not isinstance(error, Cancelled)]
        if real:
            raise real[0]

    def _work(self) -> None:
        torch.set_num_threads(1)
        worker = Worker(self._inputs, self._device, self._stop, self._watcher.advance)
        try:
            while not self._stop.is_set():
                tensor = self._next_tensor()
                if tensor is None:
                    return
                waiting = [output for output in self._outputs if tensor.name not in output.finished]
                needs = [self._need(output.tensors[tensor.name]) for output in waiting]
                with self._budget.holding(max(needs), self._stop):
                    self._make(worker, tensor.name, waiting)
                self._watcher.finished(tensor.name)
        except BaseException:
            self._stop.set()
            raise

    def _need(self, tensor: TensorPlan) -> int:
        return working_bytes(tensor, len(self._inputs.experts), self._device.type)

    def _make(self, worker: Worker, name: str, outputs: Sequence[Output]) -> None:
        """One tensor of every output that lacks it."""
        made: list[tuple[Output, TensorRecord]] = []
        with worker.sharing(len(outputs) > 1):
            for output in outputs:
                tensor, slot = output.tensors[name], output.slots[name]
                like = next((found for found in made if found[0].tensors[name] == tensor), None)
                if like is not None:
                    entry = output.copy(like[1], like[0])
                else:
                    entry = worker.make(tensor, slot, output.shards[slot.file])
                    made.append((output, entry))
                output.journal.add(entry)
                output.record(entry)

    def _next_tensor(self) -> TensorPlan | None:
        with self._lock:
            position = self._next
            if position >= len(self._pending):
                return None
            self._next += 1
        ahead = position + _READ_AHEAD
        if ahead < len(self._pending):
            self._prefetch(self._pending[ahead])
        return self._pending[position]

    def _prefetch(self, tensor: TensorPlan) -> None:
        if self._inputs.base is not None:
            self._inputs.base.prefetch((tensor.whole or tensor).name)
        for expert, stored in zip(self._inputs.experts, tensor.stored, strict=bool(tensor.stored)):
            expert.checkpoint.prefetch(stored)
