"""What every kind of source can do, and which kind an address is."""

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


class Upstream(ABC):
    """A source that was addressed but not yet read. `where` is the key of params.yaml or of the lock, for errors.

    `streams` says how many of its files may be read at once, by as many threads.
    """

    streams = 1

    def __init__(self, address: str, where: str) -> None:
        self.address = address
        self.where = where

    @property
    def in_parts(self) -> bool:
        """Whether the beginning of a file can be read without the rest of it."""
        return True

    @abstractmethod
    def resolve(self) -> Listing:
        """What lies at the address now. SourceError when nothing does, SourceUnavailable when nobody answers."""

    @abstractmethod
    def read(self, name: str, listed: Listed, offset: int = 0) -> Generator[bytes, None, None]:
        """The bytes of one file from `offset` on, in blocks; transient failures were already retried."""

    def beginning(self, name: str, listed: Listed, count: int) -> bytes:
        """The first `count` bytes of a file, or all of a shorter one; little more is read."""
        # Where the upstream reads in ranges, it asks for no more than the file is said to have.
        part = replace(listed, size_bytes=min(count, listed.size_bytes))
        return first_bytes(self.read(name, part), part.size_bytes)

    def gone(self, what: str, hint: str = "check the address and its revision in params.yaml") -> SourceError:
        """The error for something that is not there."""
        return SourceError(what, where=self.where, hint=hint)


def first_bytes(blocks: Generator[bytes, None, None], count: int) -> bytes:
    """The first `count` bytes of a stream, which is then left."""
    found = b""
    with closing(blocks):
        while len(found) < count and (block := next(blocks, b"")):
            found += block
    return found[:count]


def open_upstream(address: str, project_root: Path, where: str) -> Upstream:
    """The source at `address`, by its scheme; relative paths are taken from `project_root`."""
    scheme, separator, _ = address.partition("://")
    if address.startswith("models:/"):
        from modelweld.sources.mlflow_models import MlflowModel

        return MlflowModel(address, project_root, where)
    if not separator:
        from modelweld.sources.local import LocalPath

        return LocalPath(address, project_root, where)
    if "::" in address:
        raise SourceError("chained addresses are not sources", where=where, hint="unpack the archive upstream")
    match scheme:
        case "file" | "local":
            from modelweld.sources.local import LocalPath

            return LocalPath(address, project_root, where)
        case "hf":
            from modelweld.sources.hub import HubRepository

            return HubRepository(address, where)
        case "dvc":
            from modelweld.sources.dvc_repo import DvcPath

            return DvcPath(address, project_root, where)
        case _:
            from modelweld.sources.url import FsspecUrl

            return FsspecUrl(address, where)
