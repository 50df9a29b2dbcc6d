"""A version's weights as a local directory: brought from DVC once, checked against the version's digests every time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from modelweld import settings
from modelweld.errors import CheckpointError, DiskFull, RemoteUnavailable, WorkspaceError
from modelweld.formats.address import DvcAddress
from modelweld.formats.manifest import Manifest

UNLISTED = {"manifest.json", "README.md"}
TELEMETRY_OFF = {"DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1"}


def materialise(address: DvcAddress, cache: Path | None = None) -> Path:
    """The directory with the weights of `address`, verified; it is named by its digest and shared by every process.

    RemoteUnavailable when DVC cannot bring it, CheckpointError when what it brought (or what the cache holds) is not
    what was registered: a damaged copy is removed, so that the next call fetches again.
    """
    models = (cache or settings.cache_directory()) / "models"
    place = models / address.md5.removesuffix(".dir")
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            if not place.is_dir():
                _bring(address, place)
                return place
            try:
                verify(place, address)
            except CheckpointError:
                shutil.rmtree(place)
                raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(
                "no space left for the weights", where=str(models), hint="set MODELWELD_CACHE_DIR"
            ) from error
        raise WorkspaceError(
            f"the local copy failed: {error}", where=str(models), hint="set MODELWELD_CACHE_DIR"
        ) from error
    return place


def verify(directory: Path, address: DvcAddress) -> None:
    """Raise CheckpointError unless `directory` is what was registered.

    The version knows the SHA-256 of manifest.json, which knows the digest of every other file. The model card is not
    in it, since it is written from it; anything else beside them is refused.
    """
    # Here, because it brings torch along, which most of the registry does without.
    from modelweld.checkpoints.digests import file_sha256, holds

    manifest = directory / "manifest.json"
    found = file_sha256(manifest) if manifest.is_file() else "missing"
    if found != address.manifest_sha256:
        raise _differs("manifest.json", directory, address)
    listed = Manifest.read(manifest).output.files
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    if odd := sorted((present ^ listed.keys()) - UNLISTED):
        raise _differs(odd[0], directory, address)
    with ThreadPoolExecutor() as pool:
        same = pool.map(lambda name: holds(directory / name, listed[name]), listed)
        for name, holding in zip(listed, same, strict=True):
            if not holding:
                raise _differs(name, directory, address)


def tree_digest(directory: Path) -> str:
    """DVC's digest of a directory: the MD5 of the sorted list of its files' MD5s, ending in `.dir`."""
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _md5(directory / name), files)
        entries = [{"md5": digest, "relpath": name} for digest, name in zip(digests, files, strict=True)]
    listing = json.dumps(entries, sort_keys=True).encode()
    return hashlib.md5(listing, usedforsecurity=False).hexdigest() + ".dir"


def _bring(address: DvcAddress, place: Path) -> None:
    staging = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    tree = staging / "tree"
    repo = _reachable(address)
    try:
        if (Path(repo) / ".dvc").is_dir():
            from modelweld.workspace import Project
            from modelweld.workspace import materialise as from_project
            from modelweld.workspace.materialising import locked_digest

            project = Project.find(Path(repo))
            if locked_digest(project, address.rev, address.path) != address.md5:
                raise _differs(f"what dvc.lock names at {address.rev}", tree, address)
            # Linked out of the project's own cache where it can be: no second copy on this disk.
            from_project(project, address.rev, address.path, tree)
        else:
            _dvc_get(repo, address, tree)
            if tree_digest(tree) != address.md5:
                raise _differs("what the remote holds", tree, address)
        verify(tree, address)
        tree.rename(place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _reachable(address: DvcAddress) -> str:
    moved = settings.dvc_repository()
    if moved:
        return moved
    if Path(address.repo).is_dir():
        return address.repo
    if address.url:
        return address.url
    raise WorkspaceError(
        "the project this version was registered from is not here",
        where=address.repo,
        hint="clone it and set MODELWELD_DVC_REPO to the clone (or to its git URL)",
    )


def _dvc_get(repo: str, address: DvcAddress, out: Path) -> None:
    # A child process: DVC's temporary clone of the repository ends with it.
    path = f"{address.folder or ''}{address.path}"
    command = [sys.executable, "-m", "dvc", "get", repo, path, "--rev", address.rev, "-o", str(out)]
    environment = {**os.environ, **TELEMETRY_OFF}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    if done.returncode == 0 and out.exists():
        return
    said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    message = " ".join(said) or f"`dvc get` left with exit code {done.returncode}"
    if "No space left" in message:
        raise DiskFull("no space left for the weights", where=str(out.parent), hint="set MODELWELD_CACHE_DIR")
    if "SCM error" in message or "unknown Git revision" in message:
        hint = "push the record's tag there, or set MODELWELD_DVC_REPO to a repository that has it"
        raise WorkspaceError(message, where=str(address), hint=hint)
    raise RemoteUnavailable(
        f"DVC did not bring it: {message}",
        where=str(address),
        hint="check the DVC remote, or `dvc push` from where it was made",
    )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _differs(what: str, directory: Path, address: DvcAddress) -> CheckpointError:
    return CheckpointError(
        f"{what} is not what was registered",
        where=f"{directory} from {address}",
        hint="the local copy is dropped, try again; if it stays so the DVC remote is damaged: `modelweld rederive`",
    )
