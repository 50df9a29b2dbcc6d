"""Scores with round numbers, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping

from modelweld.formats.scores import Bounds, Interval, PairedTest, SystemScores, TaskScores


def system_scores(value: float, normalised: float, *, test: PairedTest | None = None) -> SystemScores:
    """One system with `value` as its accuracy and macro-F1."""
    interval = Interval(value=value, low=0.9 * value, high=1.1 * value)
    return SystemScores(
        accuracy=interval,
        macro_f1=interval,
        normalised=normalised,
        normalised_interval=Bounds(low=0.9 * normalised, high=1.1 * normalised),
        versus_expert=test or PairedTest(only_this=0, only_expert=0, p_value=1.0),
        model_digest="0" * 64,
    )


def task_scores(task: str, systems: Mapping[str, SystemScores], *, dataset_digest: str = "d" * 64) -> TaskScores:
    """The scores of these systems on 60 rows."""
    return TaskScores(
        task=task,
        dataset_digest=dataset_digest,
        rows=60,
        metric="accuracy",
        confidence=0.95,
        bootstrap=50,
        systems=dict(systems),
    )
