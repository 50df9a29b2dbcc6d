"""The fetch stage: one entry of sources.lock.json onto the disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from modelweld import settings
from modelweld.errors import SourceError
from modelweld.sources import LOCK_NAME, Lock
from modelweld.sources import fetch as fetch_entry
from modelweld.sources.refusals import safe_name


def fetch(key: str, root: Path) -> dict[str, Any]:
    """A summary of the fetch of `key`, whose files are now in `root`/<path of the entry>.

    `root` is where the pipeline runs; a flow runs in another git worktree than the project, so relative local sources
    are taken from MODELWELD_PROJECT_ROOT when it is set.
    """
    lock = Lock.read_if_present(root / LOCK_NAME)
    if lock is None:
        raise SourceError("nothing is pinned yet", where=str(root / LOCK_NAME), hint="run `modelweld pin`")
    entry = lock.pinned.get(key)
    if entry is None:
        raise SourceError(
            f"no entry {key!r}; there are {', '.join(sorted(lock.pinned))}",
            where=str(root / LOCK_NAME),
            hint="run `modelweld pin` after adding the source to params.yaml",
        )
    path = safe_name(entry.path, key)
    done = fetch_entry(entry, root / path, project_root(root))
    kind = "adapter" if entry.is_adapter else entry.kind
    told = {"key": key, "what": kind, "path": path, "resolved": entry.resolved, "revision": entry.revision}
    return {**told, **asdict(done)}


def project_root(root: Path) -> Path:
    """Where relative local sources start: the project, even when `root` is a flow run's worktree of it."""
    return settings.project_root(root)
