"""Writing safetensors whose headers are known before any tensor is: bytes go to their final place, in any order."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from modelweld.checkpoints.buffers import bytes_of
from modelweld.checkpoints.checkpoint import SINGLE
from modelweld.checkpoints.header import DTYPE_NAMES, LENGTH_BYTES
from modelweld.errors import DiskFull, ExternalError

ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor's place in the output: `nbytes` from `offset` of the shard named `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file: its header's bytes, its size, and the slots in it, by offset."""

    file: str
    header: bytes
    size: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Layout:
    """Where every output tensor will lie."""

    shards: tuple[Shard, ...]

    @property
    def slots(self) -> dict[str, Slot]:
        """Every slot by its tensor's name."""
        return {slot.name: slot for shard in self.shards for slot in shard.slots}

    @property
    def size_bytes(self) -> int:
        """All shards together, headers included."""
        return sum(shard.size for shard in self.shards)

    def index(self) -> bytes | None:
        """The index file's bytes; None for a single shard, which needs none."""
        if len(self.shards) == 1:
            return None
        total = sum(slot.nbytes for slot in self.slots.values())
        weight_map = {name: slot.file for name, slot in sorted(self.slots.items())}
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return (json.dumps(document, indent=2) + "\n").encode()


def lay_out(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    shard_bytes: int,
    *,
    single: str = SINGLE,
    metadata: dict[str, str] | None = None,
) -> Layout:
    """Tensors in the given order, cut into shards of at most `shard_bytes` (a larger tensor has one to itself)."""
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _nbytes(tensor)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    count = len(groups)
    stem = single.removesuffix(".safetensors")
    files = [single] if count == 1 else [f"{stem}-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    return Layout(tuple(_shard(file, group, metadata or {}) for file, group in zip(files, groups, strict=True)))


def _shard(file: str, tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> Shard:
    # The widest dtype first keeps every tensor aligned to its own item size, without padding between them.
    ordered = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    spans = []
    for name, dtype, shape in ordered:
        end = position + _nbytes((name, dtype, shape))
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        spans.append((name, dtype, shape, position, end))
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    start = LENGTH_BYTES + len(text)
    slots = tuple(
        Slot(name, dtype, shape, file, start + begin, end - begin) for name, dtype, shape, begin, end in spans
    )
    return Shard(file, len(text).to_bytes(LENGTH_BYTES, "little") + text, start + position, slots)


def _nbytes(tensor: tuple[str, torch.dtype, tuple[int, ...]]) -> int:
    _, dtype, shape = tensor
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return size


class ShardFile:
    """One output shard, preallocated with its header in place; writing is positional and thread-safe.

    Of several processes that fill a shard, one reserves it first. The others (`reserve=False`) open what is there:
    where a file system cannot preallocate, the C library does so by writing zeros, which would meet their data.
    """

    def __init__(self, shard: Shard, directory: Path, *, reserve: bool = True) -> None:
        self.shard = shard
        self.path = directory / shard.file
        with disk_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if reserve else 0), 0o666)
            if not reserve:
                return
            try:
                _reserve(self._descriptor, shard.size)
                write_at(self._descriptor, memoryview(shard.header), 0)
            except BaseException:
                os.close(self._descriptor)
                raise

    def write(self, slot: Slot, start: int, data: memoryview) -> None:
        """Put bytes at `start` of the slot."""
        with disk_errors(self.path):
            write_at(self._descriptor, data, slot.offset + start)

    def read_into(self, slot: Slot, start: int, buffer: memoryview) -> int:
        """Read back from `start` of the slot; returns how many bytes there were."""
        return os.preadv(self._descriptor, [buffer], slot.offset + start)

    def sync(self) -> None:
        """Bring the shard to the disk."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a small safetensors file (a head) at once, in the order of names, and sync it."""
    described = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    layout = lay_out(described, shard_bytes=1 << 62, single=file.name, metadata=metadata)
    out = ShardFile(layout.shards[0], file.parent)
    try:
        for slot in layout.shards[0].slots:
            if slot.nbytes:
                out.write(slot, 0, bytes_of(tensors[slot.name].contiguous()))
        out.sync()
    finally:
        out.close()


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`, however many calls that takes."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


class disk_errors:  # noqa: N801 - reads as a statement: with disk_errors(path)
    """A context in which an operating system's refusal becomes DiskFull, or an ExternalError naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                "no space left for the merged weights",
                where=str(self.path),
                hint="free space and run the same command again: what was finished is kept",
            ) from error
        raise ExternalError(f"cannot be written: {error.strerror}", where=str(self.path)) from error


def _reserve(descriptor: int, size: int) -> None:
    present = os.fstat(descriptor).st_size
    if present > size:
        os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
