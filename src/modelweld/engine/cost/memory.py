"""How much memory tensors in work may take together, and how much each is expected to."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modelweld.config.methods import MethodParameters
from modelweld.engine.plan.records import TensorPlan
from modelweld.engine.run.device_stream import CHUNK as DEVICE_CHUNK
from modelweld.errors import MergeError
from modelweld.methods.registry import method

SLACK = 256 * 1024 * 1024
_CHUNKS = 16 * 1024 * 1024  # a streaming worker's buffers, whatever the tensor

# Measured peak over the bytes of the stack of inputs, in float64 (whole matrices: projections, basis, mask) or
# in the working dtype (other methods that see a whole tensor: a trimmed copy, the masks).
_MATRIX_FACTOR = 4.5
_WHOLE_FACTOR = 3.0

WorkingBytes = Callable[[Any, int, int, int], int]


def working_bytes(tensor: TensorPlan, experts: int, device: str = "cpu") -> int:
    """What making this tensor is expected to take at its peak: of the host, and of a device of another kind."""
    if tensor.parameters is None or tensor.streamed_on(device):
        if device != "cpu":
            # Two sets of chunks of all models, and of results, are on their way.
            return _CHUNKS + 2 * DEVICE_CHUNK * tensor.work_dtype.itemsize * (experts + 2)
        # What a statistics pass holds is a share of a model's entries; where one model's is, all models' are held.
        passed = method(tensor.parameters.method).statistics if tensor.parameters else None
        held = min(1.0, passed.held_share * experts) if passed else 0.0
        return _CHUNKS + int(tensor.elements * tensor.work_dtype.itemsize * experts * held)
    if tensor.route == "factors":
        # The factors are small beside the delta, the base and the sum of both, in float64.
        shape = (tensor.whole or tensor).shape
        return _CHUNKS + int(4 * 8 * shape[0] * shape[1])
    chosen = method(tensor.parameters.method)
    if chosen.working_bytes is not None:
        return _declared_bytes(chosen.working_bytes, tensor, tensor.parameters, experts)
    if chosen.whole_matrix:
        square = min(tensor.shape[-2:]) ** 2 if len(tensor.shape) >= 2 else 0
        return int(tensor.elements * 8 * experts * _MATRIX_FACTOR) + 3 * 8 * square + tensor.elements * 12
    return int(tensor.elements * tensor.work_dtype.itemsize * (experts * _WHOLE_FACTOR + 2))


def _declared_bytes(declared: WorkingBytes, tensor: TensorPlan, parameters: MethodParameters, experts: int) -> int:
    """What a method says that it takes, beside the experts' stack, the base and the result, which the engine holds."""
    rows, columns = tensor.shape[0], tensor.elements // tensor.shape[0]
    n, m = (columns, rows) if tensor.transposed else (rows, columns)
    # The projections of a packed weight are merged one after the other.
    heights = [size * tensor.packing.groups for size in tensor.packing.sizes] if tensor.packing else [n]
    working = max(declared(parameters, experts, height, m) for height in heights)
    stacks = 2 if tensor.transposed or tensor.packing else 1  # as it was read, and upright
    return working + tensor.elements * (tensor.work_dtype.itemsize * (stacks * experts + 1) + 8)


def room(needs: Iterable[tuple[TensorPlan, int]]) -> int:
    """What tensors in work take together when nobody has set a limit, from each one's `working_bytes`.

    The largest of them and a little beside it; but two whole matrices, since arithmetic on one core outlasts all else.
    """
    largest, matrix = 0, 0
    for tensor, need in needs:
        largest = max(largest, need)
        if tensor.parameters is not None and method(tensor.parameters.method).whole_matrix:
            matrix = max(matrix, need)
    return max(largest, 2 * matrix) + SLACK


def peak_resident() -> int:
    """The most memory this process has had resident, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: Linux hands its peak on across exec, so a child of a large process would report that one's.
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Budget:
    """Bytes that tensors in work share: a thread waits until its tensor fits beside the others'.

    The needs are those of all tensors to come. Without a limit there is `room` for them, as far as it is `available`.
    """

    def __init__(
        self, limit: int | None, needs: Sequence[tuple[TensorPlan, int]], available: int | None = None
    ) -> None:
        largest = max((need for _, need in needs), default=0)
        if limit is not None and largest > limit:
            raise MergeError(
                f"the largest tensor needs {largest / 1e9:.2f} GB in work, the limit is {limit / 1e9:.2f} GB",
                where="memory_limit",
                hint="raise the limit, or give the large tensors an element-wise method by a rule",
            )
        wanted = limit if limit is not None else room(needs)
        # What does not even fit alone is tried all the same: it has the device to itself.
        self._free = wanted if available is None else min(wanted, max(largest, available))
        self._room = threading.Condition()

    @contextlib.contextmanager
    def holding(self, size: int, stop: threading.Event) -> Iterator[None]:
        """Hold `size` bytes of the budget, waiting for them unless `stop` is set meanwhile."""
        with self._room:
            while self._free < size and not stop.is_set():
                self._room.wait(timeout=0.1)
            self._free -= size
        try:
            yield
        finally:
            with self._room:
                self._free += size
                self._room.notify_all()
