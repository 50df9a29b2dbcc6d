"""sources.lock.json: what every source was, byte for byte, when it was pinned."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelweld.errors import SourceError

LOCK_NAME = "sources.lock.json"

Kind = Literal["model", "dataset"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PinnedFile(_Record):
    """One file: its digest and size, and the upstream's own version of it where the upstream keeps versions."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(ge=0)]
    version: str | None = None


class Pinned(_Record):
    """One source: `uri` as the user wrote it, `resolved` and `revision` as it was found, and every file."""

    kind: Kind
    name: str
    uri: str
    resolved: str
    revision: str | None
    licence: str | None
    allow_pickle: bool = False
    path: str
    files: dict[str, PinnedFile]
    skipped: dict[str, str] = Field(default_factory=dict, description="files of the source left behind, and why")

    @property
    def key(self) -> str:
        """The entry's key in the lock, and its instance in dvc.yaml: `fetch@<key>`."""
        return f"{self.kind}-{self.name}"

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter, which is fetched as it is, rather than a whole model."""
        weights = (name for name in self.files if name.startswith("model") and ".safetensors" in name)
        return self.kind == "model" and "adapter_config.json" in self.files and next(weights, None) is None

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size_bytes for file in self.files.values())


class Lock(_Record):
    """The whole of sources.lock.json."""

    version: Literal[1] = 1
    pinned: dict[str, Pinned]

    def to_json(self) -> str:
        """The file's text: sorted keys, so that equal pins are equal bytes and a change is a small diff."""
        document: dict[str, Any] = self.model_dump(mode="json")
        for entry in document["pinned"].values():
            for file in entry["files"].values():
                if file["version"] is None:
                    del file["version"]
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_lock(path: Path) -> Lock | None:
    """The lock at `path`, or None when nothing was pinned yet; SourceError when the file is not a lock."""
    try:
        return Lock.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SourceError(
            f"not a lock of sources: {where + ': ' if where else ''}{first['msg']}",
            where=str(path),
            hint="restore it from git, or delete it and run `modelweld pin`",
        ) from error


def write_lock(lock: Lock, path: Path) -> bool:
    """Whether the file at `path` had to change to hold `lock`; it is replaced in one step, whole or not at all."""
    text = lock.to_json().encode()
    try:
        if path.read_bytes() == text:
            return False
    except FileNotFoundError:
        pass
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return True


@dataclass(frozen=True)
class Change:
    """How one entry differs between two locks."""

    key: str
    what: Literal["new", "gone", "moved", "edited", "same"]
    before: str | None
    after: str | None
    files_changed: int
    size_bytes: int
    licence: str | None


def changes(previous: Lock | None, current: Lock) -> list[Change]:
    """Every key of both locks with what became of it: `moved` when bytes or revision did, `edited` when only params."""
    old = previous.pinned if previous else {}
    return [_change(key, old.get(key), current.pinned.get(key)) for key in sorted(old.keys() | current.pinned.keys())]


def _change(key: str, before: Pinned | None, after: Pinned | None) -> Change:
    old_files, new_files = before.files if before else {}, after.files if after else {}
    touched = sum(old_files.get(name) != new_files.get(name) for name in old_files.keys() | new_files.keys())
    what: Literal["new", "gone", "moved", "edited", "same"]
    if before is None:
        what = "new"
    elif after is None:
        what = "gone"
    elif touched or before.revision != after.revision:
        what = "moved"
    else:
        what = "same" if before == after else "edited"
    return Change(
        key=key,
        what=what,
        before=_address(before),
        after=_address(after),
        files_changed=touched,
        size_bytes=after.size_bytes if after else 0,
        licence=after.licence if after else None,
    )


def _address(entry: Pinned | None) -> str | None:
    if entry is None:
        return None
    return (
        entry.resolved
        if entry.revision is None or entry.revision in entry.resolved
        else (f"{entry.resolved} ({entry.revision})")
    )
