"""The append-only ledger of alias transitions: who moved which alias, when, why, on what evidence.

One branch a model, `modelweld/ledger/<model>`, whose tree holds `events.jsonl`. A line is one event in canonical JSON
and carries the SHA-256 of the line before it; a commit adds one line. So it travels with clone and push, a concurrent
append loses git's compare-and-swap instead of overwriting, and a changed line breaks every hash after it.

    ledger = Ledger(project_root, "demo")
    ledger.append({"event": "promoted", "model_version": 3, …}, at=datetime.now(UTC), actor="ada")
    git show modelweld/ledger/demo:events.jsonl
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelweld.errors import WorkspaceError
from modelweld.formats.ledger_event import EventKind, LedgerEvent
from modelweld.workspace.git import git, line, try_git

FILE = "events.jsonl"
COMMITTER = {"name": "modelweld", "email": "modelweld@localhost"}


@dataclass(frozen=True)
class Event:
    """One line of the ledger: what it says, and the SHA-256 of its bytes, which the next one carries."""

    entry: LedgerEvent
    digest: str

    @property
    def kind(self) -> EventKind:
        """What happened."""
        return self.entry.event

    @property
    def version(self) -> int | None:
        """The model version it is about."""
        return self.entry.model_version

    @property
    def aliases(self) -> dict[str, int]:
        """Where every alias stood after it."""
        return self.entry.aliases

    def data(self) -> dict[str, Any]:
        """The event for JSON, with its digest."""
        return {**self.entry.data(), "digest": self.digest}


class Ledger:
    """The ledger of one model in the repository at `root`."""

    def __init__(self, root: Path, model: str) -> None:
        self.root = root
        self.model = model
        self.branch = f"modelweld/ledger/{model}"
        self.ref = f"refs/heads/{self.branch}"

    def events(self) -> list[Event]:
        """Every event, oldest first; WorkspaceError when a hash, a number or the history does not fit."""
        tip = self._tip()
        if tip is None:
            return []
        events = _parse(git(self.root, "show", f"{tip}:{FILE}"), self.branch)
        commits = int(line(self.root, "rev-list", "--count", "--first-parent", tip))
        if commits != len(events):
            raise _broken(f"{len(events)} events in {commits} commits", self.branch)
        return events

    def append(self, event: Mapping[str, Any], *, at: datetime, actor: str) -> Event:
        """The event as written, numbered, timed and chained; WorkspaceError when another process was faster."""
        tip = self._tip()
        before = git(self.root, "show", f"{tip}:{FILE}") if tip else b""
        history = _parse(before, self.branch)
        entry = LedgerEvent.model_validate(
            {
                **event,
                "model": self.model,
                "sequence": len(history) + 1,
                "previous": history[-1].digest if history else None,
                "at": at.astimezone(UTC).isoformat(timespec="seconds"),
                "actor": actor,
            }
        )
        text = entry.to_json().encode()
        blob = git(self.root, "hash-object", "-w", "--stdin", stdin=before + text).decode().strip()
        tree = git(self.root, "mktree", stdin=f"100644 blob {blob}\t{FILE}\n".encode()).decode().strip()
        identity = {
            f"GIT_{role}_{key.upper()}": value for role in ("AUTHOR", "COMMITTER") for key, value in COMMITTER.items()
        }
        dates = {f"GIT_{role}_DATE": f"{int(at.timestamp())} +0000" for role in ("AUTHOR", "COMMITTER")}
        parent = ("-p", tip) if tip else ()
        commit = (
            git(
                self.root,
                "commit-tree",
                tree,
                *parent,
                stdin=f"{entry.subject}\n".encode(),
                environment=identity | dates,
            )
            .decode()
            .strip()
        )
        standing = try_git(self.root, "rev-parse", "--verify", "--quiet", self.ref)
        if standing not in (None, tip) and not self._is_ancestor(standing, tip):
            raise self._raced()
        try:
            git(self.root, "update-ref", "--create-reflog", self.ref, commit, standing or "0" * len(commit))
        except WorkspaceError as error:
            raise self._raced() from error
        return Event(entry, _digest(text))

    def push(self, remote: str) -> None:
        """Send the branch, never forced: a remote that holds events unknown here refuses."""
        try:
            git(self.root, "push", "--quiet", remote, f"{self.ref}:{self.ref}")
        except WorkspaceError as error:
            raise WorkspaceError(
                f"the ledger was not pushed: {error.what}", where=self.branch, hint=f"`git fetch {remote}`, then again"
            ) from error

    def _tip(self) -> str | None:
        """The newest commit among the branch here and its remote-tracking copies; they must be one line of history."""
        patterns = (self.ref, f"refs/remotes/*/{self.branch}")
        found = git(self.root, "for-each-ref", "--format=%(objectname)", *patterns).decode().split()
        tip: str | None = None
        for commit in found:
            if tip is None or self._is_ancestor(tip, commit):
                tip = commit
            elif not self._is_ancestor(commit, tip):
                raise WorkspaceError(
                    "the ledger here and on a remote have parted: someone appended to both",
                    where=self.branch,
                    hint=f"keep the pushed one (`git branch -f {self.branch} origin/{self.branch}`), then again",
                )
        return tip

    def _is_ancestor(self, older: str | None, newer: str | None) -> bool:
        if older is None or newer is None:
            return False
        return try_git(self.root, "merge-base", older, newer) == older

    def _raced(self) -> WorkspaceError:
        return WorkspaceError(
            "another process appended to the ledger meanwhile", where=self.branch, hint="run the same command again"
        )


def _parse(text: bytes, where: str) -> list[Event]:
    events: list[Event] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        try:
            entry = LedgerEvent.from_json(raw, f"{where}, line {number}")
        except WorkspaceError as error:
            raise _broken(f"line {number} is {error.what}", where) from error
        expected = events[-1].digest if events else None
        if entry.sequence != number or entry.previous != expected:
            raise _broken(f"line {number} does not follow the one before it", where)
        events.append(Event(entry, _digest(raw)))
    return events


def _digest(line: bytes) -> str:
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()


def _broken(what: str, where: str) -> WorkspaceError:
    return WorkspaceError(
        f"the ledger was tampered with or damaged: {what}",
        where=where,
        hint=f"compare with another clone: `git log {where}`, `git reflog {where}`",
    )
