"""The decision of the registry's gate on a version: the comparisons that stand in its tag `modelweld.gate.reasons`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError

from modelweld.errors import InputError
from modelweld.formats.document import Part, explain


class Reason(Part):
    """One comparison of the gate; `observed` and `required` are normalised scores (1.0 is the expert's)."""

    subject: str
    passed: bool
    observed: float | None = None
    required: float | None = None
    text: str


def from_tag(text: str, where: str) -> tuple[Reason, ...]:
    """The comparisons that a tag holds; InputError when it holds none."""
    try:
        return TypeAdapter(tuple[Reason, ...]).validate_json(text)
    except ValidationError as error:
        hint = "only versions that modelweld registered have been through its gate"
        raise InputError(f"not a decision of the gate: {explain(error)}", where=where, hint=hint) from error


def to_tag(reasons: Sequence[Reason]) -> str:
    """The comparisons as a tag holds them."""
    return json.dumps([reason.data() for reason in reasons], ensure_ascii=False)
