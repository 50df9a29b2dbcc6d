"""What every kind of source can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from modelweld.errors import SourceError

BLOCK_BYTES = 8 * 2**20
# What a broken connection costs at most: a line that drops more often than once in so many bytes gets nowhere.
STREAM_BYTES = 2**20


@dataclass(frozen=True)
class Listed:
    """One file as the upstream describes it; `sha256` where it publishes one, `version` where it keeps versions."""

    size_bytes: int
    sha256: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a source is right now: an address that opens the same thing again, its revision, and its files."""

    resolved: str
    revision: str | None
    files: Mapping[str, Listed]
    licence: str | None = None


class Source(ABC):
    """A source that was addressed but not yet read.

    Relative paths in `address` start at `project_root`; `where` is the key of params.yaml or of the lock, for errors.
    `streams` is the number of files that may be read at once, by as many threads.
    """

    streams = 1

    def __init__(self, address: str, project_root: Path, where: str) -> None:
        self.address = address
        self.project_root = project_root.absolute()
        self.where = where

    @property
    def supports_range_reads(self) -> bool:
        """Whether the beginning of a file can be read without the rest of it."""
        return True

    @property
    def directory(self) -> Path | None:
        """The directory on this machine that holds the source's files under their names; None where there is none."""
        return None

    @abstractmethod
    def resolve(self) -> Listing:
        """What is at the address now. SourceError if nothing is, SourceUnavailable if there is no answer."""

    @abstractmethod
    def read(self, name: str, listed: Listed, offset: int = 0) -> Generator[bytes, None, None]:
        """The bytes of one file from `offset` on, in blocks; transient failures were already retried."""

    def beginning(self, name: str, listed: Listed, count: int) -> bytes:
        """The first `count` bytes of a file, or all of a shorter one; little more is read."""
        # A source that reads in ranges asks for no more than the size it is given.
        part = replace(listed, size_bytes=min(count, listed.size_bytes))
        return first_bytes(self.read(name, part), part.size_bytes)

    def not_found(self, what: str, hint: str = "check the address and its revision in params.yaml") -> SourceError:
        """The error for something that is not there."""
        return SourceError(what, where=self.where, hint=hint)


def first_bytes(blocks: Generator[bytes, None, None], count: int) -> bytes:
    """The first `count` bytes of a stream, which is then left."""
    found = b""
    with closing(blocks):
        while len(found) < count and (block := next(blocks, b"")):
            found += block
    return found[:count]
