"""What a run ended with, as plain data: its record, its stages, its scores, its version. Imports no Prefect."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from modelweld.workspace import Record, Worktree
from modelweld.workspace.worktree import Repro

if TYPE_CHECKING:
    from modelweld.registry.from_record import Outcome


def outcome(made: Record, done: list[Repro], notes: list[str], found: Outcome | None) -> dict[str, Any]:
    """The flow's answer, as plain data."""
    return {
        "status": "registered" if found else "recorded" if done else "unchanged",
        "record": made.as_dict(),
        "stages": [asdict(repro) for repro in done],
        "scores": score_rows(made),
        "notes": notes,
        "registered": found.as_document() if found else None,
    }


def score_rows(made: Record) -> list[dict[str, Any]]:
    """One row per task and system: the metric with its interval, macro-F1, and the share of the expert's score."""
    rows = []
    for path in made.files("scores"):
        document = json.loads(made.read(path))
        for system, scores in document["systems"].items():
            chosen = scores[document["metric"]]
            rows.append(
                {
                    "task": document["task"],
                    "system": system,
                    document["metric"]: chosen["value"],
                    "low": chosen.get("low"),
                    "high": chosen.get("high"),
                    "of expert": scores.get("normalised"),
                }
            )
    return rows


def merge_notes(tree: Worktree) -> list[str]:
    """What the merge stage remarked on its models: that they are aligned already, say."""
    file = tree.path / "merged" / "manifest.json"
    # Where no stage needed the merge itself, DVC has not brought it into the worktree.
    notes: list[str] = json.loads(file.read_text(encoding="utf-8")).get("notes", []) if file.is_file() else []
    return notes
