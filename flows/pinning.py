"""A run's sources.lock.json, resolved anew or taken as it is. Imports no Prefect, so that a check needs no server."""

from __future__ import annotations

from modelweld.config import load_params
from modelweld.errors import WorkspaceError
from modelweld.sources import LOCK_NAME, Change, changes, read_lock, resolve, write_lock
from modelweld.workspace import Worktree


def pin_sources(tree: Worktree, *, frozen: bool) -> list[Change]:
    """How every source differs from the lock before; sources.lock.json is written into the worktree.

    With `frozen` the project's own lock, else the last record's, is taken as it is, and nothing is listed.
    """
    ours, theirs = tree.project.root / LOCK_NAME, tree.path / LOCK_NAME
    previous = read_lock(ours) or read_lock(theirs)
    if frozen:
        if previous is None:
            raise WorkspaceError("--frozen needs sources.lock.json", where=str(ours), hint="`modelweld pin` writes it")
        if ours.exists():
            theirs.write_bytes(ours.read_bytes())
        return []
    lock = resolve(load_params(tree.path / "params.yaml"), tree.project.root, previous)
    write_lock(lock, theirs)
    return changes(previous, lock)
