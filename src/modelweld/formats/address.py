"""Where a version's weights are: a place in a DVC repository, and the digests they must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import ValidationError

from modelweld.errors import InputError
from modelweld.formats.document import Part, explain

TAG_PREFIX = "modelweld.dvc."


class DvcAddress(Part):
    """`path` of revision `rev` in the project at `repo` (or, where that is out of reach, its git remote `url`).

    `md5` is DVC's digest of the directory, `manifest_sha256` that of its manifest.json. Both are checked. `folder` is
    where the project lies in its git repository (`sub/`), when not at the top. It stands in the tags of an MLflow
    version and in the model_config of its pyfunc, neither of which has a version of its own.
    """

    OMITTED: ClassVar = frozenset({"url", "folder"})

    repo: str
    rev: str
    path: str
    md5: str
    manifest_sha256: str
    url: str | None = None
    folder: str | None = None

    def tags(self) -> dict[str, str]:
        """The address as tags of an MLflow version."""
        return {f"{TAG_PREFIX}{key}": value for key, value in self.data().items()}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str], where: str) -> Self:
        """The address that a version's tags hold; InputError for a version that modelweld did not register."""
        found = {key.removeprefix(TAG_PREFIX): value for key, value in tags.items() if key.startswith(TAG_PREFIX)}
        return cls.from_data(found, where)

    @classmethod
    def from_data(cls, found: Mapping[str, Any], where: str) -> Self:
        """The address in a pyfunc's model_config."""
        required = {key for key, field in cls.model_fields.items() if field.is_required()}
        hint = "only versions that modelweld registered point into DVC"
        if missing := sorted(required - found.keys()):
            told = f"this version does not say where its weights are: {', '.join(missing)} missing"
            raise InputError(told, where=where, hint=hint)
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            raise InputError(f"not a DVC address: {explain(error)}", where=where, hint=hint) from error

    def __str__(self) -> str:
        return f"dvc://{self.url or self.repo}@{self.rev}:{self.path}"
