"""Where a merge grows before it appears: beside its output, under its own key, and then all at once.

`<staging>/<out's name>-<key>/tree` becomes the output by one rename; `journal` and `lock` lie beside the tree.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from modelweld.checkpoints.shards import disk_errors
from modelweld.errors import CheckpointError, ConfigError, ExternalError
from modelweld.formats.manifest import FILE, Manifest

STAGING = ".modelweld-staging"
_KEY_LENGTH = 16


def require_replaceable(out: Path) -> None:
    """Raise ConfigError unless `out` can be replaced: it does not exist, is empty, or is wholly an earlier merge."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ConfigError("exists and is not a directory", where=str(out), hint="name another output directory")
    foreign = sorted(_files(out) - _own_files(out))
    if foreign:
        raise ConfigError(
            f"holds {len(foreign)} files that no merge wrote, first {foreign[0]}",
            where=str(out),
            hint="name another output directory, or move these files away",
        )


@contextlib.contextmanager
def staged(out: Path, key: str, root: Path | None = None) -> Iterator[Path]:
    """The staging directory of the merge `key` into `out`, locked; left behind unless `publish` has emptied it.

    Raises ExternalError when another process is at the same merge. Stale stagings of other merges into `out` go away.
    """
    parent = root or out.absolute().parent / STAGING
    directory = parent / f"{out.name}-{key[:_KEY_LENGTH]}"
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not _locked(descriptor):
            raise ExternalError(
                "another process is doing this very merge", where=str(out), hint="wait for it, or stop it"
            )
        for stale in parent.glob(f"{out.name}-{'?' * _KEY_LENGTH}"):
            if stale != directory:
                _remove_if_idle(stale)
        yield directory
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            parent.rmdir()


def publish(directory: Path, out: Path) -> None:
    """Make the staged tree the output, by rename; an earlier merge there is moved aside first and then removed."""
    tree = directory / "tree"
    with disk_errors(out):
        _sync_directory(tree)
        aside = directory / f"replaced-{uuid.uuid4().hex}"
        try:
            if out.exists():
                os.rename(out, aside)
            os.rename(tree, out)
        except OSError as error:
            if aside.exists() and not out.exists():
                os.rename(aside, out)
            if error.errno == errno.EXDEV:
                raise ExternalError(
                    "the staging directory is on another file system",
                    where=str(out),
                    hint="keep .modelweld on the file system of the output",
                ) from error
            raise
        _sync_directory(out.absolute().parent)
    shutil.rmtree(directory)


def _own_files(out: Path) -> set[str]:
    try:
        listed = Manifest.read(out / FILE).output.files
    except CheckpointError:
        return set()
    return {FILE, "README.md", *listed}


def _files(out: Path) -> set[str]:
    return {file.relative_to(out).as_posix() for file in out.rglob("*") if not file.is_dir() or file.is_symlink()}


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_if_idle(stale: Path) -> None:
    try:
        descriptor = os.open(stale / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if _locked(descriptor):
            shutil.rmtree(stale)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
