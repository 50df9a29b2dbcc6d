"""Progress callbacks of the engine: one counts what it receives, one interrupts the merge after a tensor."""

from __future__ import annotations


class Stop(Exception):
    """What a Stopper raises."""


class Stopper:
    """A progress that interrupts the merge once a tensor is finished."""

    def __init__(self, tensor: str) -> None:
        self._tensor = tensor

    def begin(self, size_bytes: int, tensors: int) -> None: ...
    def advance(self, size_bytes: int) -> None: ...
    def finished(self, tensor: str) -> None:
        if tensor == self._tensor:
            raise Stop


class Counted:
    """A progress that adds up what it is told."""

    def __init__(self) -> None:
        self.total = self.read = 0
        self.tensors: list[str] = []

    def begin(self, size_bytes: int, tensors: int) -> None:
        self.total = size_bytes

    def advance(self, size_bytes: int) -> None:
        self.read += size_bytes

    def finished(self, tensor: str) -> None:
        self.tensors.append(tensor)
