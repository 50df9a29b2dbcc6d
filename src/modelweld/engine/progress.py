"""Progress of a merge, as the engine reports it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a merge reports its progress to; called from several threads."""

    def begin(self, size_bytes: int, tensors: int) -> None:
        """The merge begins: bytes to read, and tensors to write."""

    def advance(self, size_bytes: int) -> None:
        """More input has been read."""

    def finished(self, tensor: str) -> None:
        """A tensor is written and journalled."""


class NullProgress:
    """Progress that is not reported."""

    def begin(self, size_bytes: int, tensors: int) -> None:
        """Ignored."""

    def advance(self, size_bytes: int) -> None:
        """Ignored."""

    def finished(self, tensor: str) -> None:
        """Ignored."""
