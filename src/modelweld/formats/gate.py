"""validation/gate.json: what was expected of models and data, what was found, and the verdict. It holds no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from pydantic import JsonValue, field_validator

from modelweld.formats.document import Document, Part

DIGITS = 6


class Result(Part):
    """One expectation about one subject. `where` and `hint` are set when it failed."""

    subject: str
    expectation: str
    critical: bool
    success: bool
    observed: JsonValue
    where: str | None = None
    hint: str | None = None

    @field_validator("observed", mode="before")
    @classmethod
    def _stable(cls, value: Any) -> Any:
        return stable(value)


class Gate(Document):
    """All results, sorted; `fail` when one that is critical did not succeed.

    Version 1 (release 0.1) calls a result's `hint` its `mend`.
    """

    NAME: ClassVar = "gate file"
    READS: ClassVar = (1, 2)
    HINT: ClassVar = "delete it; `dvc repro validate` writes it again"

    version: Literal[2] = 2
    verdict: Literal["pass", "fail"]
    results: tuple[Result, ...]

    @classmethod
    def of(cls, results: Iterable[Result]) -> Self:
        """The gate over these results, in whatever order they came."""
        ordered = tuple(sorted(results, key=lambda result: (result.subject, result.expectation)))
        failed = any(result.critical and not result.success for result in ordered)
        return cls(verdict="fail" if failed else "pass", results=ordered)

    @property
    def refusals(self) -> tuple[Result, ...]:
        """The critical failures."""
        return tuple(result for result in self.results if result.critical and not result.success)

    @property
    def warnings(self) -> tuple[Result, ...]:
        """The failures that stop nothing."""
        return tuple(result for result in self.results if not result.critical and not result.success)

    @classmethod
    def migrated(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with `hint` for the `mend` of version 1."""
        if document["version"] != 1:
            return document
        results = document.get("results")
        renamed = {"results": [_renamed(result) for result in results]} if isinstance(results, list) else {}
        return {**document, **renamed, "version": 2}


def _renamed(result: Any) -> Any:
    if not isinstance(result, dict):
        return result
    return {("hint" if key == "mend" else key): value for key, value in result.items()}


def stable(value: Any) -> Any:
    """The value as JSON that does not change with the order of a sum: floats keep six significant digits."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): stable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [stable(item) for item in value]
    return value if isinstance(value, (int, str)) else str(value)
