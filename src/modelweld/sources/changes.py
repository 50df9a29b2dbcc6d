"""How two locks of sources differ, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelweld.formats.lock import Lock, Pinned


@dataclass(frozen=True)
class Change:
    """How one entry differs between two locks."""

    key: str
    what: Literal["new", "gone", "moved", "edited", "same"]
    before: str | None
    after: str | None
    files_changed: int
    size_bytes: int
    licence: str | None


def changes(previous: Lock | None, current: Lock) -> list[Change]:
    """Every key of both locks with what became of it: `moved` when bytes or revision did, `edited` when only params."""
    old = previous.pinned if previous else {}
    return [_change(key, old.get(key), current.pinned.get(key)) for key in sorted(old.keys() | current.pinned.keys())]


def _change(key: str, before: Pinned | None, after: Pinned | None) -> Change:
    old_files, new_files = before.files if before else {}, after.files if after else {}
    touched = sum(old_files.get(name) != new_files.get(name) for name in old_files.keys() | new_files.keys())
    what: Literal["new", "gone", "moved", "edited", "same"]
    if before is None:
        what = "new"
    elif after is None:
        what = "gone"
    elif touched or before.revision != after.revision:
        what = "moved"
    else:
        what = "same" if before == after else "edited"
    return Change(
        key=key,
        what=what,
        before=_address(before),
        after=_address(after),
        files_changed=touched,
        size_bytes=after.size_bytes if after else 0,
        licence=after.licence if after else None,
    )


def _address(entry: Pinned | None) -> str | None:
    if entry is None:
        return None
    return (
        entry.resolved
        if entry.revision is None or entry.revision in entry.resolved
        else (f"{entry.resolved} ({entry.revision})")
    )
