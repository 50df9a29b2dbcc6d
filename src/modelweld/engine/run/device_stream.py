"""A worker's own way to a device: copies through page-locked memory, one stream, and no wait but for results.

with lane.issuing():
    there = lane.send(stack)                # on its way, while the host reads on
    back = lane.bring(method(there))
lane.land()                                 # now `back` holds its values
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from modelweld.errors import ExternalError

CHUNK = 1 << 21  # elements: copies of several MB use the bus well
LEAST = 1 << 12


def free_on(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device; None elsewhere."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


class Lane:
    """What goes to `device` and comes back, in order. On the CPU nothing moves, and nothing is waited for.

    `block` is how many elements a chunk's computation may take at once: less after the device's memory ran out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = device.type
        self.block = CHUNK
        # Without a driver (fake tensors), or elsewhere than on CUDA, copies are plain ones.
        self.locked = device.type == "cuda" and torch.cuda.is_available()
        self._stream = torch.cuda.Stream(device) if self.locked else None  # type: ignore[no-untyped-call]
        self._marks: deque[torch.cuda.Event] = deque()

    @property
    def moves(self) -> bool:
        """Whether the device is another place than the host."""
        return self.kind != "cpu"

    @contextlib.contextmanager
    def issuing(self) -> Iterator[None]:
        """What is sent, computed and brought back inside is one flight, in this lane's stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
            mark.record(self._stream)
        self._marks.append(mark)

    def land(self) -> None:
        """Wait until the oldest flight is done: what it brought back is there, what it was sent may be overwritten."""
        if self._marks:
            self._marks.popleft().synchronize()

    def room(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory that the device reads and writes without help."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.locked)

    def send(self, values: Tensor) -> Tensor:
        """The values on the device: in the making, or on the CPU themselves."""
        return values.to(self.device, non_blocking=True) if self.moves else values

    def bring(self, values: Tensor) -> Tensor:
        """The values in host memory, once this flight has landed."""
        if not self.moves:
            return values
        return self.room(*values.shape, dtype=values.dtype).copy_(values, non_blocking=True)

    def shrink(self, size: int) -> None:
        """Halve the blocks, since `size` elements did not fit; raises ExternalError when they are small already."""
        self.recover()
        if size <= LEAST:
            raise ExternalError(
                f"out of memory with {size} elements at once",
                where=str(self.device),
                hint="free memory on the device, or use --device cpu",
            )
        self.block = 1 << ((size - 1).bit_length() - 1)

    def recover(self) -> None:
        """Give back what the device's allocator keeps."""
        if self.locked:
            torch.cuda.empty_cache()
