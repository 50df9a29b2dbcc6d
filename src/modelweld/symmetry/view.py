"""A checkpoint seen through an alignment: the same names and shapes, with the units in the common order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelweld.checkpoints import Checkpoint
from modelweld.checkpoints.buffers import bytes_of

Move = Callable[[str, Tensor], Tensor]


class AlignedCheckpoint(Checkpoint):
    """What `source` holds, moved tensor by tensor as it is read; each thread keeps the tensor it is at, and no other.

    `moved` names the tensors that `move` changes. `dtype` is theirs where sums need more digits than the source has.
    """

    def __init__(
        self, source: Checkpoint, move: Move, moved: Collection[str], dtype: torch.dtype | None = None
    ) -> None:
        tensors = dict(source.tensors)
        if dtype is not None:
            for name in moved:
                info = tensors[name]
                tensors[name] = replace(info, dtype=dtype, nbytes=info.elements * dtype.itemsize)
        super().__init__(source.path, tensors, {})
        self._source, self._move, self._moved, self._dtype = source, move, frozenset(moved), dtype
        self._current = threading.local()

    def __reduce__(self) -> tuple[object, ...]:
        """For another process: the source's files are opened there, and permuted by the same assignments."""
        return type(self), (self._source, self._move, sorted(self._moved), self._dtype)

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The source's config."""
        return self._source.config

    @property
    def files(self) -> list[Path]:
        """The source's weight files."""
        return self._source.files

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the moved tensor's bytes from `start` on."""
        if name not in self._moved:
            self._source.read_into(name, start, buffer)
            return
        if getattr(self._current, "name", None) != name:
            # Let go of the last one first: two large tensors need not be there at once.
            self._current.name, self._current.tensor = None, None
            moved = self._move(name, self._source.read(name)).to(self.tensors[name].dtype)
            self._current.name, self._current.tensor = name, moved.contiguous()
        whole = bytes_of(self._current.tensor)
        buffer[:] = whole[start : start + len(buffer)]

    def prefetch(self, name: str) -> None:
        """Tell the kernel that this tensor is read next."""
        self._source.prefetch(name)


class Stored(Mapping[str, Tensor]):
    """A model's state, read when it is asked for: `names` maps the common names to the checkpoint's own."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self._checkpoint, self._names = checkpoint, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._checkpoint.tensors[self._names[name]].shape
