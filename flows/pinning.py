"""A run's sources.lock.json, resolved anew or taken as it is. Imports no Prefect, so that a check needs no server."""

from __future__ import annotations

from modelweld.config import load_params
from modelweld.errors import WorkspaceError
from modelweld.formats.lock import LOCK_NAME, Lock
from modelweld.sources import Change, changes, resolve
from modelweld.workspace import Worktree


def pin_sources(tree: Worktree, *, frozen: bool) -> list[Change]:
    """How every source differs from the lock before; sources.lock.json is written into the worktree.

    With `frozen` the project's own lock, else the last record's, is taken as it is, and nothing is listed.
    """
    ours, theirs = tree.project.root / LOCK_NAME, tree.path / LOCK_NAME
    previous = Lock.read_if_present(ours) or Lock.read_if_present(theirs)
    if frozen:
        if previous is None:
            raise WorkspaceError("--frozen needs sources.lock.json", where=str(ours), hint="`modelweld pin` writes it")
        if ours.exists():
            theirs.write_bytes(ours.read_bytes())
        return []
    lock = resolve(load_params(tree.path / "params.yaml"), tree.project.root, previous)
    lock.write(theirs)
    return changes(previous, lock)
