"""Which rows to score: a data set, its split and columns, and the kind of task that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from modelweld.config import Task
from modelweld.config.align import Rows
from modelweld.kinds import DEFAULT


@dataclass(frozen=True)
class DatasetSpec:
    """Rows to score: where they are, which columns by role, and where longer texts are cut, in tokens."""

    dataset: str
    split: str = "test"
    kind: str = DEFAULT
    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 128

    @classmethod
    def of_task(cls, task: Task, root: Path) -> Self:
        """The rows of a task in params.yaml, where `fetch` puts them below `root`."""
        return cls(str(root / "datasets" / task.dataset), task.split, task.kind, task.columns_by_role, task.max_length)

    @classmethod
    def of_rows(cls, rows: Rows, max_length: int) -> Self:
        """The rows that a recipe names to align by."""
        return cls(rows.dataset, rows.split, rows.task_kind, rows.columns_by_role, max_length)

    def column(self, role: str) -> str:
        """The name of a column in the file; by default that of its role."""
        return self.columns.get(role, role)
