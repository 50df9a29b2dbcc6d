"""One line of the promotion ledger: who moved which alias, when, why, on what evidence."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from modelweld.errors import WorkspaceError
from modelweld.formats.document import Document, Layout

EventKind = Literal["challenger", "refused", "promoted", "rolled_back", "observed"]


class LedgerEvent(Document):
    """One event. `previous` is the digest of the line before it, `before` and `aliases` are the aliases around it.

    `reasons` are those of the gate's decision, `override` and `reason` what a person gave.
    """

    NAME: ClassVar = "event of the ledger"
    VERSION_KEY: ClassVar = "schema"
    READS: ClassVar = ("modelweld.ledger/1",)
    LAYOUT: ClassVar = Layout(indent=None)
    ERROR: ClassVar = WorkspaceError
    HINT: ClassVar = "compare with another clone"
    OMITTED: ClassVar = frozenset({"reasons", "override", "reason"})

    schema_: Literal["modelweld.ledger/1"] = Field("modelweld.ledger/1", alias="schema")
    model: str
    sequence: int
    previous: str | None
    at: str
    actor: str
    event: EventKind
    model_version: int | None
    record: str | None
    manifest_sha256: str | None
    gate: str | None
    before: dict[str, int]
    aliases: dict[str, int]
    reasons: tuple[str, ...] | None = None
    override: str | None = None
    reason: str | None = None

    @property
    def subject(self) -> str:
        """The event in one line: the subject of its commit."""
        return f"{self.event}: {self.model} version {self.model_version}, by {' '.join(self.actor.split())}"
