"""scores/<task>.json: every system on one task. The scoreboard over all tasks, and what the registry keeps of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal, Self

from pydantic import ValidationError

from modelweld.errors import InputError
from modelweld.formats.document import Document, Layout, Part, explain
from modelweld.kinds import MetricName

BASE, EXPERT, MERGED, MODEL = "base", "expert", "merged", "model"
FIRST, LAST = (BASE, EXPERT), (MERGED,)

Metric = MetricName


class Bounds(Part):
    """A confidence interval; None when nothing was resampled."""

    low: float | None = None
    high: float | None = None


class Interval(Bounds):
    """A value with its confidence interval."""

    value: float


class PairedTest(Part):
    """Rows that only one of two systems gets right, and the exact McNemar p-value of that imbalance."""

    only_this: int
    only_expert: int
    p_value: float


class SystemScores(Part):
    """One system on one task. `normalised` is the task's metric divided by the expert's."""

    accuracy: Interval
    macro_f1: Interval
    normalised: float
    normalised_interval: Bounds
    versus_expert: PairedTest
    model_digest: str

    def score(self, metric: Metric) -> Interval:
        """The interval of `metric`."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1}[metric]

    @property
    def relative(self) -> Interval:
        """The normalised score with its interval."""
        return Interval(value=self.normalised, low=self.normalised_interval.low, high=self.normalised_interval.high)


class PrecisionChoice(Part):
    """The precision that was asked for, and the one that was computed in."""

    requested: str
    used: Literal["float32", "bfloat16", "float16"]


class TaskScores(Document):
    """Every system on one task: what scores/<task>.json holds.

    `precision` is None in scores that release 0.1 wrote, which did not say.
    """

    OMITTED: ClassVar = frozenset({"precision"})
    NAME: ClassVar = "scores file"
    READS: ClassVar = (1,)
    LAYOUT: ClassVar = Layout(ascii_only=True)
    HINT: ClassVar = "delete it; `dvc repro` writes it again"
    MISSING_HINT: ClassVar = "`dvc repro` or `modelweld run` makes them"

    version: Literal[1] = 1
    task: str
    dataset_digest: str
    rows: int
    metric: Metric
    confidence: float
    bootstrap: int
    precision: PrecisionChoice | None = None
    systems: dict[str, SystemScores]


class RegisteredScores(Part):
    """What a registered version remembers of one task's scores: those of the merge, in a tag."""

    metric: Metric
    dataset_digest: str
    systems: dict[str, SystemScores]

    @classmethod
    def from_data(cls, found: Any, where: str) -> Self:
        """The scores in plain JSON values, as in the tag; InputError when they are none."""
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            hint = "only versions that modelweld registered have scores"
            raise InputError(f"not the scores of a version: {explain(error)}", where=where, hint=hint) from error

    @classmethod
    def of(cls, scores: TaskScores) -> Self:
        """The part of a task's scores that a later decision of the registry's gate needs."""
        kept = {name: found for name, found in scores.systems.items() if name == MERGED}
        return cls(metric=scores.metric, dataset_digest=scores.dataset_digest, systems=kept)


class Cell(Part):
    """One system on one task; `score` is that of the board's metric."""

    score: Interval
    accuracy: Interval
    macro_f1: Interval
    normalised: Interval
    versus_expert: PairedTest
    model_digest: str


class SystemSummary(Part):
    """One system over all tasks."""

    mean_normalised: float
    worst_task: str
    worst_normalised: float
    tasks: dict[str, Cell]


class TaskSummary(Part):
    """What one task was scored on."""

    rows: int
    dataset_digest: str
    confidence: float


class Summary(Part):
    """Systems × tasks, as tables, plots and `--json` show them; `order` is the order to read the systems in."""

    version: Literal[1] = 1
    metric: Metric
    order: tuple[str, ...]
    tasks: dict[str, TaskSummary]
    systems: dict[str, SystemSummary]


@dataclass(frozen=True)
class Scoreboard:
    """Systems × tasks. Systems stand in reading order: base, expert, the baselines by name, merged."""

    metric: Metric
    tasks: Mapping[str, TaskScores]

    @property
    def systems(self) -> tuple[str, ...]:
        """The systems that every task has, in reading order."""
        return reading_order(next(iter(self.tasks.values())).systems)

    def normalised(self, system: str) -> dict[str, float]:
        """Score divided by the expert's, by task; an unknown system is an InputError."""
        self._require(system)
        return {task: scores.systems[system].normalised for task, scores in self.tasks.items()}

    def mean(self, system: str) -> float:
        """The mean of the normalised scores over the tasks, each counting once."""
        return fmean(self.normalised(system).values())

    def worst(self, system: str) -> tuple[str, float]:
        """The task with the lowest normalised score, and that score."""
        return min(self.normalised(system).items(), key=lambda item: (item[1], item[0]))

    def summary(self) -> Summary:
        """The board as one document."""
        return Summary(
            metric=self.metric,
            order=self.systems,
            tasks={
                task: TaskSummary(rows=one.rows, dataset_digest=one.dataset_digest, confidence=one.confidence)
                for task, one in self.tasks.items()
            },
            systems={system: self._system(system) for system in self.systems},
        )

    def _system(self, system: str) -> SystemSummary:
        task, worst = self.worst(system)
        cells = {name: _cell(scores.systems[system], self.metric) for name, scores in self.tasks.items()}
        return SystemSummary(mean_normalised=self.mean(system), worst_task=task, worst_normalised=worst, tasks=cells)

    def _require(self, system: str) -> None:
        if system not in self.systems:
            raise InputError(f"no system named {system!r} was scored", hint=f"one of: {', '.join(self.systems)}")


def _cell(scores: SystemScores, metric: Metric) -> Cell:
    return Cell(
        score=scores.score(metric),
        accuracy=scores.accuracy,
        macro_f1=scores.macro_f1,
        normalised=scores.relative,
        versus_expert=scores.versus_expert,
        model_digest=scores.model_digest,
    )


def reading_order(systems: Iterable[str]) -> tuple[str, ...]:
    """Base, expert, the baselines by name, merged."""
    names = set(systems)
    between = sorted(names.difference(FIRST, LAST))
    return (*(name for name in FIRST if name in names), *between, *(name for name in LAST if name in names))
