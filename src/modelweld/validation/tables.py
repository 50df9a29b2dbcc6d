"""The table: rows about one subject, which the expectations of one suite are about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas

from modelweld import kinds

# What every project has, then the rows of each kind of task.
SUITES: tuple[str, ...] = ("sources", "checkpoint", "tensors", *kinds.SUITES)


@dataclass(frozen=True)
class Table:
    """Rows about one subject, for the suite of one kind.

    `subject` is what the gate file calls it (`model:sst2`, `dataset:sst2`, `task:sst2`), `path` where a person finds
    it, `key` the column that names a row, `row` what a row is called in a sentence (none: the table is its one row).
    `parameters` are the values of the suite's `$PARAMETER`s.
    """

    kind: str
    subject: str
    path: str
    frame: pandas.DataFrame
    key: str
    row: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The subject without its kind: `sst2` of `model:sst2`."""
        return self.subject.split(":", 1)[1]
