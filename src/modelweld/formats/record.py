"""The record of a run: what the message of its annotated tag, merge-run/<name>/<run-id>, says."""

from __future__ import annotations

import json
from typing import ClassVar, Literal, Self

from pydantic import Field

from modelweld.errors import WorkspaceError
from modelweld.formats.document import Document, Layout

PREFIX = "merge-run"


class RunRecord(Document):
    """`lock_digest` is the SHA-256 of dvc.lock, `verdict` that of the validation gate, `modelweld` the release."""

    NAME: ClassVar = "record of a run"
    VERSION_KEY: ClassVar = "schema"
    READS: ClassVar = ("modelweld.record/1",)
    LAYOUT: ClassVar = Layout(ascii_only=True)
    ERROR: ClassVar = WorkspaceError
    HINT: ClassVar = f"name a tag under {PREFIX}/<name>/<run-id>"

    schema_: Literal["modelweld.record/1"] = Field("modelweld.record/1", alias="schema")
    name: str
    run_id: str
    lock_digest: str
    verdict: Literal["pass", "fail"] | None
    modelweld: str
    flow_run_id: str | None
    dirty: bool

    @property
    def subject(self) -> str:
        """The first line of the tag's message, and of the commit behind it."""
        return f"{PREFIX}: {self.name} {self.run_id}"

    def to_message(self) -> str:
        """The message of the tag."""
        return f"{self.subject}\n\n{self.to_json()}"

    @classmethod
    def from_message(cls, message: str, where: str) -> Self:
        """The record that a tag's message holds; WorkspaceError for the message of another tag."""
        try:
            # A signature may follow the document.
            document, _ = json.JSONDecoder().raw_decode(message[message.index("{") :])
        except ValueError as error:
            raise WorkspaceError("this tag is not the record of a run", where=where, hint=cls.HINT) from error
        return cls.from_data(document, where)
