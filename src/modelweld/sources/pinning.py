"""From params.yaml, where revisions may float, to a lock, where nothing does."""

from __future__ import annotations

import hashlib
from pathlib import Path

from modelweld.config import Params, SourceEntry
from modelweld.formats.lock import LOCK_NAME, Kind, Lock, Pinned, PinnedFile
from modelweld.sources.licence import card_licence
from modelweld.sources.progress import Report, byte_progress
from modelweld.sources.refusals import refuse_secrets, safe_name
from modelweld.sources.schemes import open_source
from modelweld.sources.selection import select
from modelweld.sources.source import Listed, Source


def pin(params: Params, project_root: Path, previous: Lock | None = None) -> Lock:
    """`resolve`, and write the result to sources.lock.json in `project_root` (left untouched when nothing changed)."""
    lock = resolve(params, project_root, previous)
    lock.write(project_root / LOCK_NAME)
    return lock


def resolve(params: Params, project_root: Path, previous: Lock | None = None) -> Lock:
    """Every source of `params` as it is now, with the digest of each file that would be fetched. Writes nothing.

    Digests the upstream publishes are taken as they are; other files are read once, as a stream. An entry of
    `previous` whose immutable revision still stands is not read again. Local files are always read again: SHA-256
    runs at a gigabyte a second, and a date or a size is no proof.
    """
    known = previous.pinned if previous else {}
    wanted: list[tuple[Kind, str, SourceEntry]] = [("model", name, source) for name, source in params.models.items()]
    wanted += [("dataset", name, source) for name, source in params.datasets.items()]
    pinned = {}
    for kind, name, source in wanted:
        refuse_secrets(source.uri, f"{kind}s.{name}.uri")
    for kind, name, source in wanted:
        entry = _resolve_one(kind, name, source, project_root, known.get(f"{kind}-{name}"))
        pinned[entry.key] = entry
    return Lock(pinned=pinned)


def _resolve_one(kind: Kind, name: str, wanted: SourceEntry, project_root: Path, known: Pinned | None) -> Pinned:
    where = f"{kind}s.{name}"
    source = open_source(wanted.uri, project_root, f"{where}.uri")
    listing = source.resolve()
    refuse_secrets(listing.resolved, f"{where}.uri")
    for file in listing.files:
        safe_name(file, where)
    selection = select(listing.files, kind, wanted.allow_pickle, where)
    listed = {file: listing.files[file] for file in selection.wanted}
    unchanged = (
        known is not None
        and listing.revision is not None
        and (known.resolved, known.revision) == (listing.resolved, listing.revision)
        and {file: entry.size_bytes for file, entry in known.files.items()}
        == {file: entry.size_bytes for file, entry in listed.items()}
    )
    files = known.files if known and unchanged else _digests(source, listed, f"pin {kind}-{name}")
    return Pinned(
        kind=kind,
        name=name,
        uri=wanted.uri,
        resolved=listing.resolved,
        revision=listing.revision,
        licence=wanted.licence or listing.licence or card_licence(source, listing.files),
        allow_pickle=wanted.allow_pickle,
        path=f"{kind}s/{name}",
        files=files,
        skipped=selection.skipped,
    )


def _digests(source: Source, listed: dict[str, Listed], description: str) -> dict[str, PinnedFile]:
    unread = sum(file.size_bytes for file in listed.values() if file.sha256 is None)
    with byte_progress(description, unread) as report:
        return {name: _digest(source, name, file, report) for name, file in listed.items()}


def _digest(source: Source, name: str, file: Listed, report: Report) -> PinnedFile:
    if file.sha256 is not None:
        return PinnedFile(sha256=file.sha256, size_bytes=file.size_bytes, version=file.version)
    digest = hashlib.sha256()
    size_bytes = 0
    for block in source.read(name, file):
        digest.update(block)
        size_bytes += len(block)
        report(len(block))
    return PinnedFile(sha256=digest.hexdigest(), size_bytes=size_bytes, version=file.version)
