"""From a lock's entry to a directory that holds exactly those bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from filelock import FileLock

from modelweld.errors import DiskFull, SourceError, WorkspaceError
from modelweld.formats.lock import Pinned, PinnedFile
from modelweld.sources.progress import Report, byte_progress
from modelweld.sources.refusals import refuse_secrets, safe_name
from modelweld.sources.schemes import open_source
from modelweld.sources.selection import PICKLE_SUFFIXES
from modelweld.sources.source import BLOCK_BYTES, Listed, Source

STAGING = Path(".modelweld/staging")


@dataclass(frozen=True)
class Fetched:
    """What a fetch did: bytes that were transferred, and bytes that an interrupted fetch had left in staging."""

    files: int
    size_bytes: int
    transferred_bytes: int
    kept_bytes: int


def fetch(entry: Pinned, destination: Path, project_root: Path) -> Fetched:
    """Put the files of `entry`, and only those, into `destination`, which appears whole or not at all.

    Files arrive in a staging directory under `project_root`; a later fetch of the same entry goes on with what is
    there. A digest that differs from the lock is a SourceError: nothing of that file is kept. Pickled weights are
    rewritten as safetensors. Relative addresses of the lock are taken from `project_root`.
    """
    refuse_secrets(entry.resolved, entry.key)
    for name in entry.files:
        safe_name(name, entry.key)
    source = open_source(entry.resolved, project_root, entry.key)
    with _disk_trouble(entry, destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging = _staging(entry, destination, project_root)
        # Two runs may want the same source at once: the second waits, and then finds no staging directory.
        with FileLock(project_root / STAGING / f"{entry.key}.lock"):
            staging.mkdir(exist_ok=True)
            _check_space(entry, staging)
            with byte_progress(f"fetch {entry.key}", entry.size_bytes) as report:
                transferred = _download_all(source, staging, entry, report)
            _remove_unexpected(staging, entry)
            _rewrite_pickles(entry, staging)
            _publish(staging, destination)
    return Fetched(
        files=len(entry.files),
        size_bytes=entry.size_bytes,
        transferred_bytes=transferred,
        kept_bytes=entry.size_bytes - transferred,
    )


def _staging(entry: Pinned, destination: Path, project_root: Path) -> Path:
    """One directory per entry's content: another pin of the same name never continues with these bytes."""
    document = entry.model_dump_json(include={"resolved", "revision", "files"})
    name = f"fetch-{entry.key}-{hashlib.sha256(document.encode()).hexdigest()[:16]}"
    shared = project_root / STAGING
    shared.mkdir(parents=True, exist_ok=True)
    # A rename does not cross file systems, so a destination elsewhere gets a staging directory of its own next to it.
    same_device = shared.stat().st_dev == destination.parent.stat().st_dev
    return (shared if same_device else destination.parent) / (name if same_device else f".{name}")


def _download_all(source: Source, staging: Path, entry: Pinned, report: Report) -> int:
    """How many bytes were read from the upstream until every staged file is the pinned one."""
    stopped = Event()

    def report_unless_stopped(count: int) -> None:
        if stopped.is_set():
            raise _Stopped
        report(count)

    with ThreadPoolExecutor(max_workers=source.streams, thread_name_prefix="fetch") as pool:
        tasks = [
            pool.submit(_download, source, staging, name, file, entry, report_unless_stopped)
            for name, file in sorted(entry.files.items())
        ]
        try:
            # As they finish, so that the first failure is the one reported, and stops the others.
            return sum(task.result() for task in as_completed(tasks))
        except BaseException:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Stopped(Exception):
    """Another file failed, or the user interrupted: this one stops at its next block."""


def _download(source: Source, staging: Path, name: str, file: PinnedFile, entry: Pinned, report: Report) -> int:
    """How many bytes were read from the upstream until the staged file is the pinned one."""
    path = staging / name
    path.parent.mkdir(parents=True, exist_ok=True)
    have, digest = _already(path, file)
    report(have)
    if have == file.size_bytes and digest.hexdigest() == file.sha256 and path.exists():
        return 0
    transferred = _stream(source, path, name, file, have, digest, report)
    if have and digest.hexdigest() != file.sha256:
        # What an interrupted fetch left may be damaged (a power cut leaves zeros); from the start it must fit.
        path.unlink()
        report(-have - transferred)
        have, digest = 0, hashlib.sha256()
        transferred = _stream(source, path, name, file, 0, digest, report)
    if digest.hexdigest() != file.sha256:
        path.unlink()
        raise SourceError(
            f"{name}: not what was pinned (SHA-256 {digest.hexdigest()[:16]}…, pinned {file.sha256[:16]}…)",
            where=f"{entry.key} ({entry.resolved})",
            hint="upstream changed: look at it, then `modelweld pin` accepts it; an unchanged upstream was damaged "
            "on its way, and fetching again corrects that",
        )
    return transferred


def _already(path: Path, file: PinnedFile) -> tuple[int, hashlib._Hash]:
    """How much of the file is staged, and the running digest of that; a longer file is not this one."""
    digest = hashlib.sha256()
    if path.is_symlink() or (path.exists() and (not path.is_file() or path.stat().st_size > file.size_bytes)):
        raise SourceError(f"{path} is not what a fetch left there", where=path.name, hint=f"remove {path}")
    if not path.exists():
        return 0, digest
    have = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            have += len(block)
    if have == file.size_bytes and digest.hexdigest() != file.sha256:
        path.unlink()
        return 0, hashlib.sha256()
    return have, digest


def _stream(
    source: Source, path: Path, name: str, file: PinnedFile, offset: int, digest: hashlib._Hash, report: Report
) -> int:
    transferred = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "ab") as stream:
        listed = Listed(file.size_bytes, file.sha256, file.version)
        for block in source.read(name, listed, offset):
            digest.update(block)
            stream.write(block)
            transferred += len(block)
            report(len(block))
            if offset + transferred > file.size_bytes:
                break  # longer than pinned: the digest cannot fit any more, and the rest could be endless
    return transferred


def _remove_unexpected(staging: Path, entry: Pinned) -> None:
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(staging).as_posix() not in entry.files:
            path.unlink()


def _rewrite_pickles(entry: Pinned, staging: Path) -> None:
    pickled = [name for name in entry.files if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if not pickled:
        return
    if not entry.allow_pickle:
        raise SourceError(
            f"pickled weights in the lock ({', '.join(pickled)})",
            where=entry.key,
            hint="set `allow_pickle: true` for this source in params.yaml and run `modelweld pin`",
        )
    # torch is imported for this only: the other fetches start ten times faster without it.
    from modelweld.checkpoints.pickles import rewrite_pickles

    adapter = Path(pickled[0]).name.startswith("adapter_model")
    rewrite_pickles([staging / name for name in pickled], staging / f"{'adapter_' if adapter else ''}model.safetensors")
    for name in pickled:
        (staging / name).unlink()
        # An index would point readers to shards that are not there any more.
        (staging / name).with_name("pytorch_model.bin.index.json").unlink(missing_ok=True)


def _publish(staging: Path, destination: Path) -> None:
    for path in [staging, *staging.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    if not destination.exists():
        staging.rename(destination)
        return
    old = staging.with_name(f"{staging.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    destination.rename(old)
    staging.rename(destination)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink()


def _check_space(entry: Pinned, staging: Path) -> None:
    staged = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    rewritten = sum(f.size_bytes for n, f in entry.files.items() if Path(n).suffix.lower() in PICKLE_SUFFIXES)
    needed = entry.size_bytes + rewritten - staged
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise _disk_full(entry, staging, needed, free)


@contextmanager
def _disk_trouble(entry: Pinned, destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(destination.parent).free
            raise _disk_full(entry, destination, entry.size_bytes, free) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise WorkspaceError(
                f"cannot be written: {error.strerror}",
                where=str(error.filename or destination),
                hint="give this user the right to write there, or run in a directory that is not read-only",
            ) from error
        raise


def _disk_full(entry: Pinned, place: Path, needed: int, free: int) -> DiskFull:
    return DiskFull(
        f"{needed:,} bytes are needed, {free:,} are free",
        where=f"{entry.key}, on the disk of {place.parent}",
        hint="free some space; the fetch goes on where it stopped",
    )
