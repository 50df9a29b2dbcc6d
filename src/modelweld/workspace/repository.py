"""The project: its git repository and DVC cache, its runs alive and dead, its records and what they still lack."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from modelweld.errors import WorkspaceError
from modelweld.formats.record import PREFIX
from modelweld.workspace import records
from modelweld.workspace.git import git, read_file, try_git
from modelweld.workspace.processes import LineCallback
from modelweld.workspace.records import Record
from modelweld.workspace.worktree import Worktree

# Machine results: they may differ from HEAD in a clean project.
MACHINE_WRITTEN = ("dvc.lock", "sources.lock.json")
NEEDED = ("dvc.yaml", "params.yaml", ".dvc/config")
KEPT_DEAD_RUNS = 3
STEPS = ("push", "register")


@dataclass(frozen=True)
class RunState:
    """A run that has a worktree: `alive` while the process that started it lives."""

    run_id: str
    path: Path
    alive: bool
    flow_run_id: str | None


@dataclass(frozen=True)
class Unfinished:
    """A record that is not yet everywhere it should be, what is missing (`push`, `register`), and why."""

    record: Record
    steps: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True)
class Project:
    """A directory with params.yaml, dvc.yaml and .dvc, at the top of a git repository or below it."""

    root: Path
    repository: Path

    @classmethod
    def find(cls, path: Path | None = None) -> Project:
        """The project that `path` (default: the current directory) lies in.

        WorkspaceError, with what to do, when there is no git repository or DVC is not initialised.
        """
        start = (path or Path()).resolve()
        top = try_git(start, "rev-parse", "--show-toplevel")
        if top is None:
            raise WorkspaceError(
                "not in a git repository", where=str(start), hint="git init && git add --all && git commit"
            )
        repository = Path(top).resolve()
        for folder in (start, *start.parents):
            if (folder / ".dvc" / "config").is_file():
                return cls(folder, repository)
            if folder == repository:
                break
        raise WorkspaceError(
            "DVC is not initialised",
            where=str(start),
            hint="`modelweld init`, or: dvc init && dvc remote add --default store URL",
        )

    @property
    def state_dir(self) -> Path:
        """.modelweld: what modelweld keeps here, ignored by git whatever the project's .gitignore says."""
        folder = self.root / ".modelweld"
        folder.mkdir(exist_ok=True)
        ignore = folder / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n", encoding="utf-8")
        return folder

    @property
    def name(self) -> str:
        """The model's name in params.yaml."""
        from modelweld.config import load_params

        return load_params(self.root / "params.yaml").name

    def head(self) -> str:
        """The commit a run starts from; WorkspaceError when there is none yet."""
        commit = try_git(self.root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        if commit is None:
            raise WorkspaceError(
                "this git repository has no commit yet", where=str(self.repository), hint="git add --all && git commit"
            )
        return commit

    def committed(self, path: str) -> bytes | None:
        """A file as git has it at HEAD; None when it is not committed."""
        return read_file(self.root, "HEAD", path)

    def changed_files(self) -> list[str]:
        """Tracked files that differ from HEAD, but for the two locks that machines write."""
        listed = git(self.root, "diff", "--name-only", "-z", "HEAD", "--").decode()
        return sorted(path for path in listed.split("\0") if path and Path(path).name not in MACHINE_WRITTEN)

    def require_clean(self) -> None:
        """WorkspaceError when a tracked file was changed and not committed: its run could not be repeated."""
        if changed := self.changed_files():
            shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise WorkspaceError(
                f"changed but not committed: {shown}",
                where=str(self.root),
                hint="commit, or run with --allow-dirty: the record will say so",
            )

    # Runs

    @contextmanager
    def worktree(
        self,
        run_id: str | None = None,
        *,
        allow_dirty: bool = False,
        flow_run_id: str | None = None,
        keep_on_error: bool = True,
    ) -> Iterator[Worktree]:
        """A fresh checkout of HEAD over this project's DVC cache, for one run.

        It starts from the locks of the newest record of the same model, so that DVC decides what is stale. Left without
        an error it is removed; else it is kept, with whatever was done, until newer dead runs push it out, unless
        `keep_on_error` is false.
        """
        self.head()
        dirty = bool(self.changed_files())
        if dirty and not allow_dirty:
            self.require_clean()
        self.prune_worktrees()
        run_id = run_id or new_run_id()
        folder = self.state_dir / "runs"
        folder.mkdir(exist_ok=True)
        # Held by this process and released by the kernel however it ends: how a later run knows this one is dead.
        with FileLock(folder / f"{run_id}.lock", timeout=0):
            note = {"run_id": run_id, "flow_run_id": flow_run_id, "pid": os.getpid()}
            (folder / f"{run_id}.json").write_text(json.dumps(note), encoding="utf-8")
            with (
                self._forgotten_on_error(run_id, not keep_on_error),
                self._checkout(folder / run_id, "HEAD", keep_on_error=keep_on_error) as top,
            ):
                tree = Worktree(self, run_id, self._inside(top), dirty)
                if dirty:
                    self._bring_changes(top)
                self._refuse_uncommitted(tree)
                latest = self.latest_record(tree.name)
                if latest:
                    tree.restore(latest)
                yield Worktree(self, run_id, tree.path, dirty, latest)
        self._forget(run_id)

    def runs(self) -> list[RunState]:
        """The runs that have a worktree here, the newest first: those at work, those that failed, those killed."""
        found: list[RunState] = []
        for note in sorted((self.state_dir / "runs").glob("*.json"), reverse=True):
            run_id = note.stem
            try:
                flow_run_id = json.loads(note.read_text(encoding="utf-8")).get("flow_run_id")
            except (json.JSONDecodeError, FileNotFoundError):
                flow_run_id = None
            found.append(RunState(run_id, note.parent / run_id, self._alive(run_id), flow_run_id))
        return found

    def prune_worktrees(self) -> list[RunState]:
        """Remove what dead runs left, but for the newest few; the ones that were removed."""
        gone: list[RunState] = []
        for state in [run for run in self.runs() if not run.alive][KEPT_DEAD_RUNS:]:
            shutil.rmtree(state.path, ignore_errors=True)
            self._forget(state.run_id)
            gone.append(state)
        git(self.repository, "worktree", "prune")
        return gone

    # Records

    def records(self, name: str | None = None) -> list[Record]:
        """Every record here, of one model's when `name` is given; the newest first."""
        return [records.read(self.root, tag) for tag in records.tags(self.root, name)]

    def record(self, tag: str) -> Record:
        """The record behind a tag, with or without its `merge-run/` prefix; WorkspaceError when there is none."""
        return records.read(self.root, tag if tag.startswith(f"{PREFIX}/") else f"{PREFIX}/{tag}")

    def latest_record(self, name: str | None = None) -> Record | None:
        """The newest record of a model, None before its first run."""
        tags = records.tags(self.root, name)
        return records.read(self.root, tags[0]) if tags else None

    def push(self, record: Record, *, on_line: LineCallback | None = None) -> None:
        """Send the bytes of `record` to the DVC remote; RemoteUnavailable when not taken; safe to repeat."""
        with self.checkout(record.commit) as tree:
            tree.push(on_line=on_line)

    @contextmanager
    def checkout(self, rev: str) -> Iterator[Worktree]:
        """A temporary worktree at any revision, without data, over this project's cache and remote."""
        run_id = f"at-{secrets.token_hex(4)}"
        folder = self.state_dir / "looks"
        folder.mkdir(exist_ok=True)
        with self._checkout(folder / run_id, rev, keep_on_error=False) as top:
            yield Worktree(self, run_id, self._inside(top))

    def mark_unfinished(self, record: Record, steps: tuple[str, ...] = STEPS, reason: str | None = None) -> None:
        """Note that `record` still needs `steps`; kept until `mark_done`, whatever happens to this process."""
        path = self._pending(record)
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps({"tag": record.tag, "steps": steps, "reason": reason}), encoding="utf-8")
        draft.replace(path)

    def mark_done(self, record: Record, step: str) -> None:
        """Note that `step` of `record` is done."""
        left = tuple(s for s in self.missing_steps(record) if s != step)
        if left:
            self.mark_unfinished(record, left)
        else:
            self._pending(record).unlink(missing_ok=True)

    def missing_steps(self, record: Record) -> tuple[str, ...]:
        """What `record` still needs: of `push` and `register`, in this order."""
        return next((known.steps for known in self.unfinished() if known.record.tag == record.tag), ())

    def unfinished(self) -> list[Unfinished]:
        """The records that are not pushed or not registered yet, the newest first."""
        found: list[Unfinished] = []
        for path in sorted((self.state_dir / "pending").glob("*.json"), reverse=True):
            said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if try_git(self.root, "rev-parse", "--verify", "--quiet", f"refs/tags/{said['tag']}") is None:
                path.unlink()  # its tag was deleted: there is nothing left to finish
                continue
            found.append(Unfinished(records.read(self.root, said["tag"]), tuple(said["steps"]), said["reason"]))
        return found

    # The worktree's making

    @contextmanager
    def _checkout(self, path: Path, rev: str, *, keep_on_error: bool) -> Iterator[Path]:
        git(self.repository, "worktree", "add", "--detach", "--quiet", str(path), rev)
        try:
            self._share_cache(path)
            yield path
        except BaseException:
            if not keep_on_error:
                self._drop(path)
            raise
        self._drop(path)

    def _drop(self, path: Path) -> None:
        # Twice: once for the untracked files of a run, once for a worktree that somebody locked.
        git(self.repository, "worktree", "remove", "--force", "--force", str(path))

    def _inside(self, top: Path) -> Path:
        return top / self.root.relative_to(self.repository)

    def _share_cache(self, top: Path) -> None:
        """Give the worktree this project's cache, and its remotes where a relative path would lead elsewhere."""
        from dvc.config import Config, ConfigError

        target = self._inside(top) / ".dvc"
        if not (target / "config").is_file():
            return  # refused below, with the other files that are not committed
        try:
            ours = Config(str(self.root / ".dvc"), validate=False)
            local = ours.load_one("local")
            for level in ("repo", "local"):
                for name, remote in ours.load_one(level)["remote"].items():
                    if "url" in remote:
                        local["remote"].setdefault(name, {})["url"] = str(remote["url"])
            local["cache"]["dir"] = str(ours.get("cache", {}).get("dir") or self.root / ".dvc" / "cache")
            # DVC's own place for this lies outside the project and would keep a folder for every run for ever.
            local["core"]["site_cache_dir"] = str(target / "tmp" / "site")
            with Config(str(target), validate=False).edit("local") as theirs:
                theirs.update(local)
        except ConfigError as error:
            raise WorkspaceError(
                f"DVC cannot read its configuration: {error}", where=str(self.root / ".dvc")
            ) from error

    def _bring_changes(self, top: Path) -> None:
        changes = git(self.repository, "diff", "--binary", "--no-color", "--no-ext-diff", "HEAD", "--")
        git(top, "apply", "--whitespace=nowarn", "-", stdin=changes)

    def _refuse_uncommitted(self, tree: Worktree) -> None:
        missing = [name for name in NEEDED if not (tree.path / name).is_file()]
        if missing:
            raise WorkspaceError(
                f"not committed: {', '.join(missing)}",
                where=str(self.root),
                hint=f"git add {' '.join(missing)} && git commit",
            )

    @contextmanager
    def _forgotten_on_error(self, run_id: str, forget: bool) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if forget:
                self._forget(run_id)
            raise

    def _alive(self, run_id: str) -> bool:
        try:
            with FileLock(self.state_dir / "runs" / f"{run_id}.lock", timeout=0):
                return False
        except Timeout:
            return True

    def _forget(self, run_id: str) -> None:
        for suffix in (".json", ".lock"):
            (self.state_dir / "runs" / f"{run_id}{suffix}").unlink(missing_ok=True)

    def _pending(self, record: Record) -> Path:
        return self.state_dir / "pending" / f"{record.run_id}.json"


def new_run_id(now: datetime | None = None) -> str:
    """UTC time, so that names sort by age, and a few random digits, so that two runs of one second differ."""
    return f"{(now or datetime.now(UTC)):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
