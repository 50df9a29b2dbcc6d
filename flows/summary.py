"""What a run ended with, as plain data: its record, its stages, its scores, its version. Imports no Prefect."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from modelweld.formats.manifest import FILE, Manifest
from modelweld.formats.scores import TaskScores
from modelweld.workspace import Record, Worktree
from modelweld.workspace.worktree import Repro

if TYPE_CHECKING:
    from modelweld.registry.from_record import Outcome


def outcome(made: Record, done: list[Repro], notes: list[str], found: Outcome | None) -> dict[str, Any]:
    """The flow's answer, as plain data."""
    return {
        "status": "registered" if found else "recorded" if done else "unchanged",
        "record": made.data(),
        "stages": [asdict(repro) for repro in done],
        "scores": score_rows(made),
        "notes": notes,
        "registered": found.data() if found else None,
    }


def score_rows(made: Record) -> list[dict[str, Any]]:
    """One row per task and system: the metric with its interval, macro-F1, and the share of the expert's score."""
    rows = []
    for path in made.files("scores"):
        task = TaskScores.from_json(made.read(path), f"{made.tag}: {path}")
        for system, scores in task.systems.items():
            chosen = scores.score(task.metric)
            rows.append(
                {
                    "task": task.task,
                    "system": system,
                    task.metric: chosen.value,
                    "low": chosen.low,
                    "high": chosen.high,
                    "of expert": scores.normalised,
                }
            )
    return rows


def merge_notes(tree: Worktree) -> list[str]:
    """What the merge stage remarked on its models: that they are aligned already, say."""
    file = tree.path / "merged" / FILE
    # Where no stage needed the merge itself, DVC has not brought it into the worktree.
    found = Manifest.read_if_present(file)
    return [] if found is None else list(found.notes)
