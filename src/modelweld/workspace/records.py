"""What a run leaves in git: a commit beside main and an annotated tag, which `dvc gc` sees and clones bring along."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from modelweld.errors import WorkspaceError
from modelweld.workspace.git import git, identity, line, read_file, try_git

PREFIX = "merge-run"
SCHEMA = "modelweld.record/1"


@dataclass(frozen=True)
class Record:
    """One finished run: its tag, the commit behind it, and what the tag's message says.

    `root` is the project's directory, `lock_digest` the SHA-256 of dvc.lock, `verdict` that of the validation gate.
    """

    tag: str
    commit: str
    run_id: str
    name: str
    lock_digest: str
    verdict: str | None
    modelweld: str
    flow_run_id: str | None
    dirty: bool
    root: Path

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

    def as_dict(self) -> dict[str, Any]:
        """What --json prints and other rooms store."""
        return {
            "tag": self.tag,
            "commit": self.commit,
            "run_id": self.run_id,
            "name": self.name,
            "lock_digest": self.lock_digest,
            "verdict": self.verdict,
            "modelweld": self.modelweld,
            "flow_run_id": self.flow_run_id,
            "dirty": self.dirty,
            "address": self.address,
        }


def write(
    tree: Path,
    *,
    root: Path,
    name: str,
    run_id: str,
    files: Iterable[str],
    verdict: str | None,
    flow_run_id: str | None,
    dirty: bool,
) -> Record:
    """The record of the run in the worktree folder `tree`: HEAD's tree, what the run changed, and `files`.

    Neither a branch nor an index of the repository is touched. `files` are taken although git ignores them.
    """
    lock = tree / "dvc.lock"
    if not lock.is_file():
        raise WorkspaceError("no dvc.lock: nothing was run here", where=str(tree), hint="run the stages first")
    said = {
        "schema": SCHEMA,
        "name": name,
        "run_id": run_id,
        "lock_digest": "sha256:" + hashlib.sha256(lock.read_bytes()).hexdigest(),
        "verdict": verdict,
        "modelweld": version("modelweld"),
        "flow_run_id": flow_run_id,
        "dirty": dirty,
    }
    subject = f"{PREFIX}: {name} {run_id}"
    with tempfile.TemporaryDirectory(prefix="modelweld-index-") as folder:
        who = identity(tree)
        index = {**who, "GIT_INDEX_FILE": str(Path(folder) / "index")}
        git(tree, "read-tree", "HEAD", environment=index)
        git(tree, "add", "--update", ":/", environment=index)
        wanted = "\0".join(sorted(set(files) | {"dvc.lock"})).encode()
        git(tree, "add", "--force", "--pathspec-from-file=-", "--pathspec-file-nul", stdin=wanted, environment=index)
        content = git(tree, "write-tree", environment=index).decode().strip()
        commit = git(tree, "commit-tree", content, "-p", "HEAD", "-m", subject, environment=index).decode().strip()
    tag = f"{PREFIX}/{name}/{run_id}"
    message = f"{subject}\n\n{json.dumps(said, indent=2, sort_keys=True)}\n"
    git(tree, "tag", "--annotate", "--file=-", tag, commit, stdin=message.encode(), environment=who)
    return read(root, tag)


def read(root: Path, tag: str) -> Record:
    """The record behind `tag`; WorkspaceError when there is none or when it is not one of modelweld's."""
    tag = tag.removeprefix("refs/tags/")
    commit = try_git(root, "rev-parse", "--verify", "--quiet", f"refs/tags/{tag}^{{commit}}")
    if commit is None:
        raise WorkspaceError(f"no record {tag!r}", where=str(root), hint=f"`git tag --list '{PREFIX}/*'` lists them")
    body = line(root, "for-each-ref", "--format=%(contents)", f"refs/tags/{tag}")
    said: dict[str, Any] | None = None
    if "{" in body:
        try:
            # A signature may follow the document.
            said, _ = json.JSONDecoder().raw_decode(body[body.index("{") :])
        except json.JSONDecodeError:
            said = None
    if said is None or said.get("schema") != SCHEMA:
        raise WorkspaceError(
            "this tag is not the record of a run", where=tag, hint=f"name a tag under {PREFIX}/<name>/<run-id>"
        )
    return Record(
        tag=tag,
        commit=commit,
        run_id=said["run_id"],
        name=said["name"],
        lock_digest=said["lock_digest"],
        verdict=said["verdict"],
        modelweld=said["modelweld"],
        flow_run_id=said["flow_run_id"],
        dirty=said["dirty"],
        root=root,
    )


def tags(root: Path, name: str | None = None) -> list[str]:
    """The tags of all records, of one model's when `name` is given; the newest first, by run id."""
    listed = line(root, "for-each-ref", "--format=%(refname:strip=2)", f"refs/tags/{PREFIX}/{name or ''}".rstrip("/"))
    return sorted(listed.split(), key=lambda tag: PurePosixPath(tag).name, reverse=True)
