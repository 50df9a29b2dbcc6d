"""The gate in front of `challenger`: every task close to its expert, and no worse than the champion on shared tasks.

A scoreboard maps each task to its scores, or to the part of them that a registered version remembers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from modelweld.config import Register
from modelweld.formats.decision import Reason
from modelweld.formats.scores import MERGED, RegisteredScores, TaskScores

Scoreboard = Mapping[str, TaskScores | RegisteredScores]


@dataclass(frozen=True)
class Decision:
    """Whether a version may be challenger, with every reason for and against."""

    passed: bool
    reasons: tuple[Reason, ...]

    @property
    def verdict(self) -> str:
        """`passed` or `refused`."""
        return "passed" if self.passed else "refused"

    def explain(self) -> str:
        """The reasons that refused it, or all of them when it passed, one a line."""
        shown = [reason.text for reason in self.reasons if self.passed or not reason.passed]
        return "\n".join(shown)

    def data(self) -> dict[str, Any]:
        """The decision for JSON."""
        return {"verdict": self.verdict, "reasons": [reason.data() for reason in self.reasons]}


def decide(scoreboard: Scoreboard, champion: Scoreboard | None, thresholds: Register) -> Decision:
    """The decision on a merge with this scoreboard, against the champion's where there is one."""
    if not scoreboard:
        return Decision(False, (Reason(subject="scores", passed=False, text="no task was evaluated"),))
    reasons = [_task(task, normalised(scores), thresholds.min_relative) for task, scores in sorted(scoreboard.items())]
    if champion is not None:
        reasons.extend(_against(scoreboard, champion, thresholds.champion_margin))
    return Decision(all(reason.passed for reason in reasons), tuple(reasons))


def normalised(scores: TaskScores | RegisteredScores) -> float | None:
    """The merged model's score as a fraction of its expert's; None when there is none or it is not finite."""
    merged = scores.systems.get(MERGED)
    return merged.normalised if merged is not None and math.isfinite(merged.normalised) else None


def mean_normalised(scoreboard: Scoreboard, tasks: set[str] | None = None) -> float | None:
    """The mean over the tasks that have a normalised score."""
    values = [normalised(scores) for task, scores in scoreboard.items() if tasks is None or task in tasks]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _task(task: str, value: float | None, required: float) -> Reason:
    subject = f"task:{task}"
    if value is None:
        text = f"{task}: no finite score relative to its expert"
        return Reason(subject=subject, passed=False, required=required, text=text)
    relation = "≥" if value >= required else "<"
    text = f"{task}: {value:.4f} of its expert {relation} {required}"
    return Reason(subject=subject, passed=value >= required, observed=value, required=required, text=text)


def _against(scoreboard: Scoreboard, champion: Scoreboard, margin: float) -> list[Reason]:
    common = {
        task
        for task in scoreboard.keys() & champion.keys()
        if normalised(scoreboard[task]) is not None and normalised(champion[task]) is not None
    }
    mine, theirs = mean_normalised(scoreboard, common), mean_normalised(champion, common)
    reasons = [
        _note(task, "the champion has this task, this merge does not") for task in sorted(champion.keys() - scoreboard)
    ]
    reasons += [
        _note(task, "the champion was scored on other rows of this task")
        for task in sorted(common)
        if scoreboard[task].dataset_digest != champion[task].dataset_digest
    ]
    if mine is None or theirs is None:
        text = "no scored task in common with the champion: not compared"
        return [*reasons, Reason(subject="champion", passed=True, text=text)]
    required = theirs - margin
    relation = "≥" if mine >= required else "<"
    text = (
        f"mean over {len(common)} common tasks: {mine:.4f} {relation} {required:.4f} (champion {theirs:.4f} - {margin})"
    )
    return [
        *reasons,
        Reason(subject="champion", passed=mine >= required, observed=mine, required=required, text=text),
    ]


def _note(task: str, text: str) -> Reason:
    return Reason(subject=f"task:{task}", passed=True, text=f"{task}: {text}")
