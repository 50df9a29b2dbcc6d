"""A worker's stream on a device: copies through page-locked memory; it synchronises only when results are read.

with stream.submit():
    there = stream.to_device(stack)                # on its way, while the host reads on
    back = stream.to_host(method(there))
stream.synchronize()                                 # now `back` holds its values
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


class DeviceStream:
    """Copies to `device` and back, in order. On a CPU nothing is copied and nothing waits.

    `block` is how many elements a chunk's computation may take at once: less after the device's memory ran out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = device.type
        self.block = CHUNK
        # Without a driver (fake tensors), or elsewhere than on CUDA, copies are plain ones.
        self.locked = device.type == "cuda" and torch.cuda.is_available()
        self._cuda = torch.cuda.Stream(device) if self.locked else None  # type: ignore[no-untyped-call]
        self._marks: deque[torch.cuda.Event] = deque()

    @property
    def is_accelerator(self) -> bool:
        """Whether the device has memory of its own."""
        return self.kind != "cpu"

    @contextlib.contextmanager
    def submit(self) -> Iterator[None]:
        """Copies and kernels issued inside run in this stream, as one unit that `synchronize` waits for."""
        if self._cuda is None:
            yield
            return
        with torch.cuda.stream(self._cuda):
            yield
            mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
            mark.record(self._cuda)
        self._marks.append(mark)

    def synchronize(self) -> None:
        """Wait for the oldest unit: its results are there, and the buffers that it read may be overwritten."""
        if self._marks:
            self._marks.popleft().synchronize()

    def pinned_empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in page-locked host memory."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.locked)

    def to_device(self, values: Tensor) -> Tensor:
        """The values on the device, once it has copied them; on a CPU the values themselves."""
        return values.to(self.device, non_blocking=True) if self.is_accelerator else values

    def to_host(self, values: Tensor) -> Tensor:
        """The values in host memory, valid after `synchronize`."""
        if not self.is_accelerator:
            return values
        return self.pinned_empty(*values.shape, dtype=values.dtype).copy_(values, non_blocking=True)

    def halve_block(self, size: int) -> None:
        """Halve `block`, since `size` elements did not fit; raises ExternalError when they are small already."""
        self.release_cached()
        if size <= LEAST:
            raise ExternalError(
                f"out of memory with {size} elements at once",
                where=str(self.device),
                hint="free memory on the device, or use --device cpu",
            )
        self.block = 1 << ((size - 1).bit_length() - 1)

    def release_cached(self) -> None:
        """Release the memory that the device's allocator keeps."""
        if self.locked:
            torch.cuda.empty_cache()
