"""sources.lock.json: what every source was, byte for byte, when it was pinned."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from modelweld.errors import SourceError
from modelweld.formats.document import Document, Part

LOCK_NAME = "sources.lock.json"

Kind = Literal["model", "dataset"]


class PinnedFile(Part):
    """One file: its digest and size, and the upstream's own version of it where the upstream keeps versions."""

    OMITTED: ClassVar = frozenset({"version"})

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(ge=0)]
    version: str | None = None


class Pinned(Part):
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


class Lock(Document):
    """The whole of sources.lock.json: one entry per source, by its key."""

    NAME: ClassVar = "lock of sources"
    READS: ClassVar = (1,)
    ERROR: ClassVar = SourceError
    HINT: ClassVar = "restore it from git, or delete it and run `modelweld pin`"
    MISSING_HINT: ClassVar = "run `modelweld pin`"

    version: Literal[1] = 1
    pinned: dict[str, Pinned]

    def entries(self, kind: Kind) -> dict[str, Pinned]:
        """The pinned models, or the pinned datasets, by their names."""
        return {entry.name: entry for entry in self.pinned.values() if entry.kind == kind}
