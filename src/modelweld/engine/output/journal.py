"""The record of finished tensors, one JSON line each: what a resumed merge need not do again, once it was checked."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self

from modelweld.checkpoints.shards import disk_errors

JOURNAL = "journal"
_PARTIAL = "journal.new"


@dataclass(frozen=True)
class TensorRecord:
    """A tensor that is on disk: digests of its bytes and of the inputs', and what rounding left of its delta.

    `delta_norm` is the norm of what was merged into the base, `survival` the share of it that the output's dtype kept;
    both are None where the base was not read. `diagnostics` are what the method reports of this tensor; `fallback` says
    that the device's memory ran out: it was merged on the `cpu`, or in smaller `blocks`, which changes no byte.
    """

    tensor: str
    digest: str
    inputs: Mapping[str, str]
    delta_norm: float | None = None
    survival: float | None = None
    diagnostics: Mapping[str, float | int | str] = field(default_factory=dict)
    fallback: Literal["cpu", "blocks"] | None = None


def recorded(directory: Path) -> dict[str, TensorRecord]:
    """Every whole line of every journal in a staging directory, by tensor; torn lines, as a kill leaves them, are not.

    Each process of a merge keeps a journal of its own, `journal` or `journal.<its name>`.
    """
    found: dict[str, TensorRecord] = {}
    for path in _journals(directory):
        for line in path.read_bytes().splitlines():
            try:
                entry = TensorRecord(**json.loads(line))
            except (ValueError, TypeError):
                continue
            found[entry.tensor] = entry
    return found


def begun(directory: Path, entries: Iterable[TensorRecord]) -> Journal:
    """A journal that holds these entries, in the place of all that are there."""
    stale = _journals(directory)
    with disk_errors(directory / JOURNAL):
        (directory / _PARTIAL).write_bytes(b"".join(map(_line, entries)))
        (directory / _PARTIAL).replace(directory / JOURNAL)
        for path in stale:
            if path.name != JOURNAL:
                path.unlink(missing_ok=True)
    return Journal(directory / JOURNAL)


class Journal:
    """An append-only file of TensorRecord lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with disk_errors(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def add(self, entry: TensorRecord) -> None:
        """Append one line, whole, from any thread."""
        with self._lock, disk_errors(self._path):
            os.write(self._descriptor, _line(entry))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()


def _line(entry: TensorRecord) -> bytes:
    return (json.dumps(asdict(entry), sort_keys=True) + "\n").encode()


def _journals(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob(f"{JOURNAL}*") if path.name != _PARTIAL)
