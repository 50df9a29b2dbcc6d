"""Where a version's weights are: a place in a DVC repository, and the digests they must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from modelweld.errors import InputError

TAG_PREFIX = "modelweld.dvc."


@dataclass(frozen=True)
class DvcAddress:
    """`path` of revision `rev` in the project at `repo` (or, where that is out of reach, its git remote `url`).

    `md5` is DVC's digest of the directory, `manifest_sha256` that of its manifest.json. Both are checked. `folder` is
    where the project lies in its git repository (`sub/`), when not at the top.
    """

    repo: str
    rev: str
    path: str
    md5: str
    manifest_sha256: str
    url: str | None = None
    folder: str | None = None

    def as_tags(self) -> dict[str, str]:
        """The address as tags of an MLflow version."""
        return {f"{TAG_PREFIX}{key}": value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str], where: str) -> Self:
        """The address that a version's tags hold; InputError for a version that modelweld did not register."""
        found = {key.removeprefix(TAG_PREFIX): value for key, value in tags.items() if key.startswith(TAG_PREFIX)}
        return cls.from_mapping(found, where)

    @classmethod
    def from_mapping(cls, found: Mapping[str, Any], where: str) -> Self:
        """The address in a pyfunc's model_config."""
        missing = {"repo", "rev", "path", "md5", "manifest_sha256"} - found.keys()
        if missing:
            raise InputError(
                f"this version does not say where its weights are: {', '.join(sorted(missing))} missing",
                where=where,
                hint="only versions that modelweld registered point into DVC",
            )
        return cls(**{key: found[key] for key in cls.__dataclass_fields__ if key in found})

    def __str__(self) -> str:
        return f"dvc://{self.url or self.repo}@{self.rev}:{self.path}"
