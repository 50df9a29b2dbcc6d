"""One output of a record, brought back from the cache or the remote and checked against what dvc.lock said."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from modelweld.errors import RemoteUnavailable, WorkspaceError
from modelweld.workspace import graph
from modelweld.workspace.git import git
from modelweld.workspace.repository import Project


def materialise(project: Project, rev: str, path: str, out: Path) -> Path:
    """`out`, holding the output `path` (e.g. `merged`, or a file in it) as it was at `rev`, a record's tag or a commit.

    The bytes come from the DVC cache, else from the remote. They are hashed again before `out` appears: what differs
    from dvc.lock is an error and leaves nothing. Files may be read-only links into the cache: copy before you change.
    """
    if out.exists():
        raise WorkspaceError("already exists", where=str(out), hint="name a path that does not exist yet")
    digest, inside = _locked(project, rev, path)
    draft = out.with_name(f".{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear(draft)
    try:
        _fill(project, digest, inside, draft, where=f"{rev}:{path}")
        draft.replace(out)
    finally:
        _clear(draft)
    return out


def locked_digest(project: Project, rev: str, path: str) -> str:
    """The MD5 that dvc.lock at `rev` gives the output `path`, as DVC writes it (a directory's ends in `.dir`)."""
    digest, inside = _locked(project, rev, path)
    if inside:
        raise WorkspaceError(f"not an output of its own: it lies in {path.removesuffix(inside)}", where=f"{rev}:{path}")
    return digest


def _locked(project: Project, rev: str, path: str) -> tuple[str, str]:
    """The digest of the output that is or holds `path`, and what remains of the path inside it."""
    document = yaml.safe_load(git(project.root, "show", f"{rev}:./dvc.lock"))
    wanted = PurePosixPath(path)
    outs = [out for stage in document.get("stages", {}).values() for out in stage.get("outs", [])]
    for out in outs:
        if "md5" in out and wanted.is_relative_to(out["path"]):
            inside = wanted.relative_to(out["path"]).as_posix()
            return out["md5"], "" if inside == "." else inside
    known = ", ".join(sorted(out["path"] for out in outs))
    raise WorkspaceError(f"dvc.lock names no output {path!r}", where=rev, hint=f"one of: {known}")


def _fill(project: Project, digest: str, inside: str, draft: Path, where: str) -> None:
    from dvc.config import RemoteConfigError
    from dvc_data.hashfile import load
    from dvc_data.hashfile.checkout import checkout
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_objects.fs.local import localfs

    with graph.opened(project.root) as repo:
        cache = repo.cache.local
        wanted = HashInfo("md5", digest)
        if not _complete(cache, wanted):
            try:
                repo.cloud.pull([wanted])
                if wanted.isdir and cache.exists(wanted.value):
                    # Pulling a directory may bring no more than the list of its files.
                    listed: Any = load(cache, wanted)
                    repo.cloud.pull([entry for _, _, entry in listed])
            except (OSError, RemoteConfigError) as error:
                raise RemoteUnavailable(
                    f"not in the cache, and the remote did not answer: {error}", where=where
                ) from error
            if not _complete(cache, wanted):
                raise RemoteUnavailable(
                    "neither the cache nor the remote holds all of it", where=where, hint="`dvc push` where it was made"
                )
        found: Any = load(cache, wanted)
        if inside:
            found = _part(cache, found, inside, where)
        checkout(str(draft), localfs, found, cache, force=True, quiet=True)
        _check(found, draft, where)


def _complete(cache: Any, wanted: Any) -> bool:
    from dvc_data.hashfile import load

    try:
        found: Any = load(cache, wanted)
    except FileNotFoundError:
        return False
    if not wanted.isdir:
        return bool(cache.exists(wanted.value))
    return all(cache.exists(entry.value) for _, _, entry in found)


def _part(cache: Any, tree: Any, inside: str, where: str) -> Any:
    from dvc_data.hashfile import load

    key = PurePosixPath(inside).parts
    for name, _, entry in tree:
        if name == key:
            return load(cache, entry)
    raise WorkspaceError(f"it holds no file {inside!r}", where=where, hint="name the whole output, or one file in it")


def _check(found: Any, path: Path, where: str) -> None:
    """Hash what was written, from its bytes, whatever DVC remembers of them; RemoteUnavailable where it differs."""
    files = {"": found.hash_info.value}
    if found.hash_info.isdir:
        files = {"/".join(key): entry.value for key, _, entry in found}
        said = found.hash_info.value
        found.digest()
        if found.hash_info.value != said:
            raise _damaged("the list of its files", where)
    for name, digest in files.items():
        with (path / name if name else path).open("rb") as file:
            if hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != digest:
                raise _damaged(name or path.name, where)


def _damaged(name: str, where: str) -> RemoteUnavailable:
    return RemoteUnavailable(
        f"{name}: its bytes are not those that dvc.lock names",
        where=where,
        hint="the cache or the remote is damaged: remove the file there, and push it again from where it is whole",
    )


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
