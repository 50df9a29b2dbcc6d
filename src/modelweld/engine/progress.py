"""Who is told how far a merge is."""

from __future__ import annotations

from typing import Protocol


class Watcher(Protocol):
    """Who is told how far a merge is; called from several threads."""

    def begin(self, size_bytes: int, tensors: int) -> None:
        """So much is to be read, for so many tensors."""

    def advance(self, size_bytes: int) -> None:
        """More input has been read."""

    def finished(self, tensor: str) -> None:
        """A tensor is written and journalled."""


class Silent:
    """A watcher that says nothing."""

    def begin(self, size_bytes: int, tensors: int) -> None:
        """Say nothing."""

    def advance(self, size_bytes: int) -> None:
        """Say nothing."""

    def finished(self, tensor: str) -> None:
        """Say nothing."""
