"""scores/<task>.json as frozen records, and the scoreboard over all tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from modelweld.errors import InputError
from modelweld.hardware import PrecisionChoice

VERSION = 1
BASE, EXPERT, MODEL = "base", "expert", "model"
FIRST, LAST = (BASE, EXPERT), ("merged",)

Metric = str


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval; `low` and `high` are None when nothing was resampled."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class PairedTest:
    """Rows that only one of two systems gets right, and the exact McNemar p-value of that imbalance."""

    only_this: int
    only_expert: int
    p_value: float


@dataclass(frozen=True)
class SystemScores:
    """One system on one task. `normalised` is the task's metric divided by the expert's."""

    accuracy: Interval
    macro_f1: Interval
    normalised: Interval
    versus_expert: PairedTest
    model_digest: str

    def score(self, metric: Metric) -> Interval:
        """The interval of `metric`."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1}[metric]


@dataclass(frozen=True)
class TaskScores:
    """Every system on one task: what scores/<task>.json holds.

    `precision` is what the predictions were really computed in, beside what was asked for; None in scores that 0.1.0
    wrote, which did not say.
    """

    task: str
    dataset_digest: str
    rows: int
    metric: Metric
    confidence: float
    bootstrap: int
    systems: dict[str, SystemScores]
    precision: PrecisionChoice | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: `normalised` is a bare number; its interval is a key of its own."""
        document = asdict(self) | {"version": VERSION}
        if self.precision is None:
            del document["precision"]
        for system in document["systems"].values():
            interval = system.pop("normalised")
            system["normalised"] = interval.pop("value")
            system["normalised_interval"] = interval
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> TaskScores:
        """The records of a document that `to_dict` made; KeyError or TypeError when it is not one."""
        systems = {
            name: SystemScores(
                accuracy=Interval(**entry["accuracy"]),
                macro_f1=Interval(**entry["macro_f1"]),
                normalised=Interval(entry["normalised"], **entry["normalised_interval"]),
                versus_expert=PairedTest(**entry["versus_expert"]),
                model_digest=entry["model_digest"],
            )
            for name, entry in document["systems"].items()
        }
        kept = {key: document[key] for key in ("task", "dataset_digest", "rows", "metric", "confidence", "bootstrap")}
        precision = document.get("precision")
        return cls(**kept, systems=systems, precision=None if precision is None else PrecisionChoice(**precision))


@dataclass(frozen=True)
class Scoreboard:
    """Systems × tasks. Systems stand in reading order: base, expert, the baselines by name, merged."""

    metric: Metric
    tasks: dict[str, TaskScores]

    @property
    def systems(self) -> tuple[str, ...]:
        """The systems that every task has, in reading order."""
        return reading_order(next(iter(self.tasks.values())).systems)

    def normalised(self, system: str) -> dict[str, float]:
        """Score divided by the expert's, by task; an unknown system is an InputError."""
        self._require(system)
        return {task: scores.systems[system].normalised.value for task, scores in self.tasks.items()}

    def mean(self, system: str) -> float:
        """The mean of the normalised scores over the tasks, each counting once."""
        return fmean(self.normalised(system).values())

    def worst(self, system: str) -> tuple[str, float]:
        """The task with the lowest normalised score, and that score."""
        return min(self.normalised(system).items(), key=lambda item: (item[1], item[0]))

    def documents(self) -> dict[str, dict[str, Any]]:
        """Each task's document as it stands in scores/<task>.json: what the registry's gate decides on."""
        return {task: scores.to_dict() for task, scores in self.tasks.items()}

    def to_dict(self) -> dict[str, Any]:
        """One JSON document: what tables, plots and `--json` read."""
        systems = {
            system: {
                "mean_normalised": self.mean(system),
                "worst_task": self.worst(system)[0],
                "worst_normalised": self.worst(system)[1],
                "tasks": {
                    task: {
                        "score": asdict(scores.systems[system].score(self.metric)),
                        "accuracy": asdict(scores.systems[system].accuracy),
                        "macro_f1": asdict(scores.systems[system].macro_f1),
                        "normalised": asdict(scores.systems[system].normalised),
                        "versus_expert": asdict(scores.systems[system].versus_expert),
                        "model_digest": scores.systems[system].model_digest,
                    }
                    for task, scores in self.tasks.items()
                },
            }
            for system in self.systems
        }
        tasks = {
            task: {"rows": scores.rows, "dataset_digest": scores.dataset_digest, "confidence": scores.confidence}
            for task, scores in self.tasks.items()
        }
        return {"version": VERSION, "metric": self.metric, "order": list(self.systems), "tasks": tasks} | {
            "systems": systems
        }

    def _require(self, system: str) -> None:
        if system not in self.systems:
            raise InputError(f"no system named {system!r} was scored", hint=f"one of: {', '.join(self.systems)}")


def reading_order(systems: Iterable[str]) -> tuple[str, ...]:
    """Base, expert, the baselines by name, merged."""
    names = set(systems)
    between = sorted(names.difference(FIRST, LAST))
    return (*(name for name in FIRST if name in names), *between, *(name for name in LAST if name in names))


def write_scores(scores: TaskScores, path: Path) -> None:
    """Write scores/<task>.json: sorted keys, two spaces, one final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_scores(path: Path) -> TaskScores:
    """The scores of one task; InputError when the file is not a scores document."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            raise InputError(
                f"scores of version {document['version']}, this modelweld reads {VERSION}",
                where=str(path),
                hint="`dvc repro` with this modelweld writes them again",
            )
        return TaskScores.from_dict(document)
    except FileNotFoundError as error:
        raise InputError("no such scores", where=str(path), hint="`dvc repro` or `modelweld run` makes them") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"not a scores file: {error}", where=str(path), hint="delete it; `dvc repro` writes it again"
        ) from error


def scoreboard(root: Path, tasks: Iterable[str] | None = None) -> Scoreboard:
    """Every task's scores below `root` (a project, or its scores/ folder), or those of `tasks`.

    InputError when there are none, when tasks were scored by different metrics, or when a system is missing in one.
    """
    folder = root / "scores" if (root / "scores").is_dir() else root
    names = sorted(path.stem for path in folder.glob("*.json")) if tasks is None else list(tasks)
    found = {name: read_scores(folder / f"{name}.json") for name in names}
    if not found:
        raise InputError("no scores here", where=str(folder), hint="`dvc repro` or `modelweld run` makes them")
    metrics = {scores.metric for scores in found.values()}
    if len(metrics) > 1:
        raise InputError(
            f"tasks scored by different metrics: {', '.join(sorted(metrics))}",
            where=str(folder),
            hint="`dvc repro` scores them all by `evaluate.metric`",
        )
    everything = set().union(*(scores.systems for scores in found.values()))
    for name, scores in found.items():
        if missing := everything.difference(scores.systems):
            raise InputError(
                f"no scores of {', '.join(sorted(missing))}, which other tasks have",
                where=str(folder / f"{name}.json"),
                hint="`dvc repro` scores every system on every task; delete the scores of tasks that no longer exist",
            )
    return Scoreboard(metrics.pop(), found)
