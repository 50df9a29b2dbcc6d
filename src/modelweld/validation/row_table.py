"""Evaluation rows as a table: what is empty, repeated, contradictory, unknown to the head, or leaked from training."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.json
import pyarrow.parquet

from modelweld.config import Task, Validate
from modelweld.errors import InputError
from modelweld.evaluation.kinds import kind_of
from modelweld.evaluation.kinds.base import Inspection, TaskKind
from modelweld.validation.tables import Table

__all__ = ["Column", "read_column", "row_table", "split_file"]

SUFFIXES = (".parquet", ".csv", ".jsonl")
_COMPARED = ("repeated", "contradicted", "leaked")


@dataclass(frozen=True)
class Column:
    """One column of one split, as it stands. `class_names` are the set's own names for integer labels."""

    values: list[Any]
    class_names: tuple[str, ...] | None = None


def row_table(name: str, task: Task, dataset: Path, path: str, labels: Sequence[str], limits: Validate) -> Table:
    """The rows that `task` is scored on, compared with each other and with those of its training split.

    The task's kind decides what is in a row, and when two rows are the same. `path` names the dataset in messages,
    `labels` are the classes of the task's head. InputError when a split or a column is missing or cannot be read.
    """
    kind, file = kind_of(task.kind), split_file(dataset, task.split)
    columns = {role: read_column(file, column) for role, column in task.columns_by_role.items()}
    trained = set() if task.train_split is None else _identities(kind, task, split_file(dataset, task.train_split))
    inspected = _inspected(kind, columns)
    targets = _targets(kind, columns, labels)
    answers: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for inspection, written in zip(inspected, _written(kind, columns), strict=True):
        if inspection.identity and None not in written:
            answers[inspection.identity].add(tuple(map(str, written)))
    seen: set[str] = set()
    rows = []
    for number, (inspection, target) in enumerate(zip(inspected, targets, strict=True)):
        identity = inspection.identity
        rows.append(
            {
                "row": number,
                **inspection.findings,
                **target,
                "repeated": bool(identity) and identity in seen,
                "contradicted": bool(identity) and len(answers[identity]) > 1,
                "leaked": bool(identity) and identity in trained,
            }
        )
        seen.add(identity)
    types = {**kind.finding_types, **kind.target_types}
    frame = pandas.DataFrame(rows, columns=["row", *types, *_COMPARED])
    return Table(
        kind=kind.declaration.suite,
        subject=f"task:{name}",
        path=f"{path}/{file.name}",
        frame=frame.astype({column: dtype for column, dtype in types.items() if dtype is not None}),
        key="row",
        row="row",
        parameters=_limits(limits, labels),
    )


def _inspected(kind: TaskKind, columns: Mapping[str, Column]) -> list[Inspection]:
    inputs = {role: columns[role].values for role in kind.declaration.inputs}
    return [kind.inspect(dict(zip(inputs, cells, strict=True))) for cells in zip(*inputs.values(), strict=True)]


def _identities(kind: TaskKind, task: Task, file: Path) -> set[str]:
    columns = {role: read_column(file, task.columns_by_role[role]) for role in kind.declaration.inputs}
    return {inspection.identity for inspection in _inspected(kind, columns) if inspection.identity}


def _written(kind: TaskKind, columns: Mapping[str, Column]) -> list[tuple[Any, ...]]:
    """The target cells of every row, as they are written."""
    return list(zip(*(columns[role].values for role in kind.declaration.targets), strict=True))


def _targets(kind: TaskKind, columns: Mapping[str, Column], labels: Sequence[str]) -> list[Mapping[str, Any]]:
    roles = kind.declaration.targets
    inspect = kind.target_inspector({role: columns[role].class_names for role in roles}, labels)
    return [inspect(dict(zip(roles, cells, strict=True))) for cells in _written(kind, columns)]


def _limits(limits: Validate, labels: Sequence[str]) -> dict[str, Any]:
    """The parameters of the suites over evaluation rows: thresholds and the head's classes."""
    return {
        "min_rows": limits.min_rows,
        # 1 - 0.7 is a little more than 0.3, and a share of exactly 0.3 must pass.
        "min_unleaked_share": round(1 - limits.max_leakage, 9),
        "min_distinct_share": round(1 - limits.max_duplicates, 9),
        "labels": list(range(len(labels))),
    }


def split_file(dataset: Path, split: str) -> Path:
    """The one file of a split: <split>.parquet, .csv or .jsonl."""
    found = [path for suffix in SUFFIXES if (path := dataset / f"{split}{suffix}").is_file()]
    if not found:
        there = sorted(path.name for path in dataset.glob("*") if path.suffix in SUFFIXES)
        raise InputError(f"no split {split!r}; it holds {', '.join(there) or 'no data files'}", where=dataset.name)
    if len(found) > 1:
        raise InputError(
            f"split {split!r} is there more than once: {', '.join(path.name for path in found)}", where=dataset.name
        )
    return found[0]


def read_column(file: Path, name: str) -> Column:
    """One column of a data file; InputError, naming the columns there are, when it has none of this name."""
    try:
        table = _read(file)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot be read: {str(error).splitlines()[0]}", where=file.name) from error
    if name not in table.column_names:
        raise InputError(f"no column {name!r} among {', '.join(table.column_names)}", where=file.name)
    return Column(table.column(name).to_pylist(), _class_names(table.schema, name))


def _read(file: Path) -> pyarrow.Table:
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file)
    if file.suffix == ".csv":
        # As the evaluation reads it: "NA" and "null" are texts, and an empty field is an empty text.
        return pyarrow.Table.from_pandas(pandas.read_csv(file, keep_default_na=False), preserve_index=False)
    # One block for the whole file: a row may not straddle two.
    block = min(max(file.stat().st_size, 1) + 1, 2**31 - 1)
    return pyarrow.json.read_json(file, read_options=pyarrow.json.ReadOptions(block_size=block))


def _class_names(schema: pyarrow.Schema, column: str) -> tuple[str, ...] | None:
    """Names that the `datasets` library kept in the file for an integer column."""
    kept = (schema.metadata or {}).get(b"huggingface")
    if kept is None:
        return None
    try:
        names = json.loads(kept)["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None
