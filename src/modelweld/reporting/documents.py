"""The documents that reports are made of, as the evaluation writes them."""

from __future__ import annotations

from typing import Any, Protocol, TypedDict, cast


class Interval(TypedDict):
    """A value and its confidence interval, which is None where nothing was resampled."""

    value: float
    low: float | None
    high: float | None


class PairedTest(TypedDict):
    """Rows that only one of the two gets right, and the exact McNemar p-value."""

    only_this: int
    only_expert: int
    p_value: float


class Cell(TypedDict):
    """One system on one task; `score` is that of the board's metric."""

    score: Interval
    accuracy: Interval
    macro_f1: Interval
    normalised: Interval
    versus_expert: PairedTest
    model_digest: str


class SystemDocument(TypedDict):
    """One system over all tasks."""

    mean_normalised: float
    worst_task: str
    worst_normalised: float
    tasks: dict[str, Cell]


class TaskDocument(TypedDict):
    """What one task was scored on."""

    rows: int
    dataset_digest: str
    confidence: float


class ScoreDocument(TypedDict):
    """Systems × tasks; `order` is the order to read the systems in."""

    metric: str
    order: list[str]
    tasks: dict[str, TaskDocument]
    systems: dict[str, SystemDocument]


class Scoreboard(Protocol):
    """Anything that gives a ScoreDocument."""

    def to_dict(self) -> dict[str, Any]:
        """The document."""


def document_of(scoreboard: Scoreboard) -> ScoreDocument:
    """The scoreboard as a typed document."""
    return cast(ScoreDocument, scoreboard.to_dict())


def metric_name(document: ScoreDocument) -> str:
    """The metric's name for people."""
    return document["metric"].replace("_", "-").replace("f1", "F1")


SIGNIFICANT = 0.05


def mark(test: PairedTest) -> str:
    """▾ or ▴ where the system differs from the expert beyond chance, else nothing."""
    if test["p_value"] >= SIGNIFICANT:
        return ""
    return "▾" if test["only_this"] < test["only_expert"] else "▴"
