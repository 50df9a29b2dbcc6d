"""What all documents have in common: frozen fields, a version, one reader, one writer, a JSON Schema."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import CoreSchema

from modelweld.errors import InputError, ModelweldError


@dataclass(frozen=True)
class Layout:
    """How the JSON of a document is laid out. Keys are always sorted, so that equal documents are equal bytes."""

    indent: int | None = 2
    ascii_only: bool = False
    nan: bool = False


class Part(BaseModel):
    """A frozen part of a document. It refuses keys that it does not know.

    Fields named in `OMITTED` are left out of the JSON when they are None; other fields that are None are null.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True, ser_json_inf_nan="constants"
    )

    OMITTED: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_omitted(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        return {key: value for key, value in fields.items() if value is not None or key not in self.OMITTED}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        # A field with a default may be missing in what is read, and is there in all that is written.
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema["required"] = sorted(schema["properties"].keys() - cls.OMITTED)
        return schema

    def data(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)


class Document(Part):
    """A document with a version. A class says how its JSON is laid out, and what a reader is told when it is wrong.

    `READS` are the versions that `read` takes, under the key `VERSION_KEY`; the last one is written.
    """

    NAME: ClassVar[str]
    VERSION_KEY: ClassVar[str] = "version"
    READS: ClassVar[tuple[int | str, ...]]
    LAYOUT: ClassVar[Layout] = Layout()
    ERROR: ClassVar[type[ModelweldError]] = InputError
    HINT: ClassVar[str]
    MISSING_HINT: ClassVar[str | None] = None

    def to_json(self) -> str:
        """The document's text: sorted keys and a newline at the end."""
        layout = self.LAYOUT
        text = json.dumps(
            self.data(),
            sort_keys=True,
            indent=layout.indent,
            separators=(",", ":") if layout.indent is None else None,
            ensure_ascii=layout.ascii_only,
            allow_nan=layout.nan,
        )
        return text + "\n"

    def write(self, path: Path) -> bool:
        """Whether the file at `path` had to change; it is replaced in one step, whole or not at all.

        It is never written into: DVC may have linked it, read-only, into its cache.
        """
        text = self.to_json().encode()
        if path.is_file() and path.read_bytes() == text:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
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

    @classmethod
    def read(cls, path: Path) -> Self:
        """The document in the file at `path`; an error of the document's kind when it holds no such document."""
        try:
            text = path.read_bytes()
        except OSError as error:
            hint = cls.MISSING_HINT or cls.HINT
            raise cls.ERROR(f"no readable {cls.NAME}: {error.strerror}", where=str(path), hint=hint) from error
        return cls.from_json(text, str(path))

    @classmethod
    def read_if_present(cls, path: Path) -> Self | None:
        """As `read`, or None when there is no file at `path`."""
        return cls.read(path) if path.exists() else None

    @classmethod
    def from_json(cls, text: bytes | str, where: str) -> Self:
        """The document that `text` is; `where` names its place in errors."""
        try:
            document = json.loads(text)
        except ValueError as error:
            raise cls.ERROR(f"not a {cls.NAME}: {error}", where=where, hint=cls.HINT) from error
        return cls.from_data(document, where)

    @classmethod
    def from_data(cls, document: Any, where: str) -> Self:
        """The document in plain JSON values. Those of an older version are migrated, those of a newer one refused."""
        if not isinstance(document, Mapping):
            raise cls.ERROR(f"not a {cls.NAME}: no JSON object", where=where, hint=cls.HINT)
        found = document.get(cls.VERSION_KEY)
        if found not in cls.READS:
            known = " or ".join(str(version) for version in cls.READS)
            raise cls.ERROR(
                f"not a {cls.NAME} that this release reads: {cls.VERSION_KEY} is {found!r}, known is {known}",
                where=where,
                hint="read it with the release that wrote it, or a newer one",
            )
        try:
            return cls.model_validate(cls.migrated(dict(document)))
        except ValidationError as error:
            raise cls.ERROR(f"not a {cls.NAME}: {explain(error)}", where=where, hint=cls.HINT) from error

    @classmethod
    def migrated(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document in the newest version; one of an older version has its keys renamed here."""
        return document


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, with its place in the document."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])
