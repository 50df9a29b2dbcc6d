"""What a run leaves in git: a commit beside main and an annotated tag, which `dvc gc` sees and clones bring along."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from modelweld.errors import WorkspaceError
from modelweld.formats.record import PREFIX, RunRecord
from modelweld.workspace.git import git, identity, line, read_file, try_git


@dataclass(frozen=True)
class Record:
    """One finished run: its tag, the commit behind it, and what the tag's message says. `root` is the project's."""

    tag: str
    commit: str
    message: RunRecord
    root: Path

    @property
    def name(self) -> str:
        """The model's name."""
        return self.message.name

    @property
    def run_id(self) -> str:
        """The run's id, which begins with its time."""
        return self.message.run_id

    @property
    def lock_digest(self) -> str:
        """The SHA-256 of dvc.lock."""
        return self.message.lock_digest

    @property
    def verdict(self) -> Literal["pass", "fail"] | None:
        """The verdict of the validation gate; None when the graph has no gate."""
        return self.message.verdict

    @property
    def flow_run_id(self) -> str | None:
        """The flow run that made it; None for one that was made by hand."""
        return self.message.flow_run_id

    @property
    def dirty(self) -> bool:
        """Whether the run had uncommitted changes."""
        return self.message.dirty

    @property
    def address(self) -> str:
        """The merged model's DVC address at this record."""
        return self.pointer("merged")

    def pointer(self, out: str) -> str:
        """The DVC address of any output, e.g. `baselines`, at this record."""
        return f"dvc://{self.root}@{self.tag}:{out}"

    def read(self, path: str) -> bytes:
        """A file as git has it in the record, e.g. `dvc.lock`, `scores/sst2.json`; WorkspaceError without one."""
        # `./` makes git resolve the path from the project's own folder, which may lie below the repository's top.
        return git(self.root, "show", f"{self.commit}:./{path}")

    def find(self, path: str) -> bytes | None:
        """A file as git has it in the record; None when the record does not hold it."""
        return read_file(self.root, self.commit, path)

    def files(self, folder: str) -> list[str]:
        """The paths of the files that git has under `folder` in the record."""
        listed = git(self.root, "ls-tree", "-r", "-z", "--name-only", self.commit, f"./{folder}/").decode()
        return sorted(path for path in listed.split("\0") if path)

    def data(self) -> dict[str, Any]:
        """What --json prints of it."""
        message = {key: value for key, value in self.message.data().items() if key != "schema"}
        return {"tag": self.tag, "commit": self.commit, **message, "address": self.address}


def write(
    tree: Path,
    *,
    root: Path,
    name: str,
    run_id: str,
    files: Iterable[str],
    verdict: Literal["pass", "fail"] | None,
    flow_run_id: str | None,
    dirty: bool,
) -> Record:
    """The record of the run in the worktree folder `tree`: HEAD's tree, what the run changed, and `files`.

    Neither a branch nor an index of the repository is touched. `files` are taken although git ignores them.
    """
    lock = tree / "dvc.lock"
    if not lock.is_file():
        raise WorkspaceError("no dvc.lock: nothing was run here", where=str(tree), hint="run the stages first")
    message = RunRecord(
        name=name,
        run_id=run_id,
        lock_digest="sha256:" + hashlib.sha256(lock.read_bytes()).hexdigest(),
        verdict=verdict,
        modelweld=version("modelweld"),
        flow_run_id=flow_run_id,
        dirty=dirty,
    )
    with tempfile.TemporaryDirectory(prefix="modelweld-index-") as folder:
        who = identity(tree)
        index = {**who, "GIT_INDEX_FILE": str(Path(folder) / "index")}
        git(tree, "read-tree", "HEAD", environment=index)
        git(tree, "add", "--update", ":/", environment=index)
        wanted = "\0".join(sorted(set(files) | {"dvc.lock"})).encode()
        git(tree, "add", "--force", "--pathspec-from-file=-", "--pathspec-file-nul", stdin=wanted, environment=index)
        content = git(tree, "write-tree", environment=index).decode().strip()
        commit = (
            git(tree, "commit-tree", content, "-p", "HEAD", "-m", message.subject, environment=index).decode().strip()
        )
    tag = f"{PREFIX}/{name}/{run_id}"
    git(tree, "tag", "--annotate", "--file=-", tag, commit, stdin=message.to_message().encode(), environment=who)
    return read(root, tag)


def read(root: Path, tag: str) -> Record:
    """The record behind `tag`; WorkspaceError when there is none or when it is not one of modelweld's."""
    tag = tag.removeprefix("refs/tags/")
    commit = try_git(root, "rev-parse", "--verify", "--quiet", f"refs/tags/{tag}^{{commit}}")
    if commit is None:
        raise WorkspaceError(f"no record {tag!r}", where=str(root), hint=f"`git tag --list '{PREFIX}/*'` lists them")
    body = line(root, "for-each-ref", "--format=%(contents)", f"refs/tags/{tag}")
    return Record(tag, commit, RunRecord.from_message(body, tag), root)


def tags(root: Path, name: str | None = None) -> list[str]:
    """The tags of all records, of one model's when `name` is given; the newest first, by run id."""
    listed = line(root, "for-each-ref", "--format=%(refname:strip=2)", f"refs/tags/{PREFIX}/{name or ''}".rstrip("/"))
    return sorted(listed.split(), key=lambda tag: PurePosixPath(tag).name, reverse=True)
