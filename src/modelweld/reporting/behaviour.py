"""Where two systems behave differently on one task, out of predictions/<task>.parquet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modelweld.errors import InputError

SHOWN = 6


@dataclass(frozen=True)
class ClassChange:
    """One class: how many rows it has, and the share of them that either system finds."""

    name: str
    rows: int
    expert_recall: float
    merged_recall: float

    @property
    def change(self) -> float:
        """What the merge gained (or, below zero, lost) on this class."""
        return self.merged_recall - self.expert_recall


@dataclass(frozen=True)
class Behaviour:
    """The merge and the expert on one task: how often they agree, how sure they are, which classes moved most."""

    task: str
    agreement: float
    expert_confidence: float
    merged_confidence: float
    classes: tuple[ClassChange, ...]
    confusions: tuple[tuple[str, str, int], ...]


def behaviour(path: Path) -> Behaviour:
    """The comparison that the file allows; InputError when it is no predictions file with an expert and a merge."""
    columns = ["label", "expert", "expert.confidence", "merged", "merged.confidence"]
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(
            f"not a predictions file: {error}", where=str(path), hint="`dvc repro` makes it again"
        ) from error
    label, expert, merged = (np.array(table[name].to_pylist(), dtype=object) for name in ("label", "expert", "merged"))
    changes = [
        ClassChange(
            str(name),
            int(np.sum(label == name)),
            float(np.mean(expert[label == name] == name)),
            float(np.mean(merged[label == name] == name)),
        )
        for name in sorted(set(label))
    ]
    broken = (merged != label) & (expert == label)
    lost = Counter(zip(label[broken].tolist(), merged[broken].tolist(), strict=True))
    confusions = sorted(
        ((truth, given, rows) for (truth, given), rows in lost.items()), key=lambda c: (-c[2], c[0], c[1])
    )
    return Behaviour(
        task=path.stem,
        agreement=float(np.mean(expert == merged)),
        expert_confidence=float(np.mean(table["expert.confidence"].to_numpy())),
        merged_confidence=float(np.mean(table["merged.confidence"].to_numpy())),
        classes=tuple(sorted(changes, key=lambda change: (change.change, change.name))[:SHOWN]),
        confusions=tuple(confusions[:SHOWN]),
    )
