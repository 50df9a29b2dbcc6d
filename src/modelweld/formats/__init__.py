"""The documents that stages, records, the registry and the ledger write: one frozen, versioned model for each.

Every document is a promise: a later release reads what an earlier one wrote. A document's class reads it (`read`,
`from_json`), refuses versions that it does not know, writes it (`write`, `to_json`) as the same bytes for equal
contents, and has a JSON Schema (`modelweld schema --document NAME`).

    lock = Lock.read(Path("sources.lock.json"))
    json_schema("manifest")
"""

from __future__ import annotations

from typing import Any

from modelweld.formats.address import DvcAddress
from modelweld.formats.alignment import AlignmentRecord
from modelweld.formats.document import Document, Part
from modelweld.formats.gate import Gate
from modelweld.formats.ledger_event import LedgerEvent
from modelweld.formats.lock import Lock
from modelweld.formats.manifest import Manifest
from modelweld.formats.record import RunRecord
from modelweld.formats.scores import TaskScores

DOCUMENTS: dict[str, type[Part]] = {
    "lock": Lock,
    "gate": Gate,
    "scores": TaskScores,
    "manifest": Manifest,
    "alignment": AlignmentRecord,
    "record": RunRecord,
    "ledger-event": LedgerEvent,
    "address": DvcAddress,
}

__all__ = [
    "DOCUMENTS",
    "AlignmentRecord",
    "Document",
    "DvcAddress",
    "Gate",
    "LedgerEvent",
    "Lock",
    "Manifest",
    "Part",
    "RunRecord",
    "TaskScores",
    "json_schema",
]


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of the document `name`, one of DOCUMENTS, as this release writes it."""
    return DOCUMENTS[name].model_json_schema()
