"""Image tasks in one joint label space: every head answers every row, over the classes of all heads together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelweld.checkpoints.folding import base_for
from modelweld.checkpoints.loading import tasks
from modelweld.config import Evaluate, load_params
from modelweld.errors import ConfigError
from modelweld.evaluation.cache import content_key
from modelweld.evaluation.dataset_spec import DatasetSpec
from modelweld.evaluation.images import image_logits, joint, preprocessing
from modelweld.evaluation.kinds import kind_of
from modelweld.evaluation.kinds.base import Rows
from modelweld.evaluation.labels import LabelSpace
from modelweld.evaluation.metrics import Resampling, accuracy, score_systems
from modelweld.evaluation.progress import evaluation_progress
from modelweld.evaluation.settings import Settings, settings_of
from modelweld.evaluation.systems import System, classes_of, model_digest, open_system
from modelweld.formats.scores import MODEL, PrecisionChoice, TaskScores

ENSEMBLE = "ensemble"
KIND = "image-classification"


@dataclass(frozen=True)
class JointScores:
    """Scores over the classes of all tasks, and each system's accuracy within every task's own classes."""

    scores: TaskScores
    within: Mapping[str, Mapping[str, float]]
    classes: Mapping[str, Sequence[str]]

    def data(self) -> dict[str, Any]:
        """One JSON document: that of the scores, with the keys `within` and `classes`."""
        own = {"within": {name: dict(found) for name, found in self.within.items()}}
        return self.scores.data() | own | {"classes": {task: list(names) for task, names in self.classes.items()}}


def evaluate_joint(
    model: Path, params_file: Path, split: str | None, columns: Mapping[str, str], metric: str | None
) -> JointScores:
    """The joint scores of a merged directory, as system "model", on the rows of all its heads' tasks together.

    Where the tasks' experts are in models/ their logits side by side are the system "ensemble", which scores are
    normalised by. The heads were trained apart and nothing made their logits comparable: this asks more than each task
    alone. `split` and `columns` replace those of every task. Raises ConfigError for fewer than two heads and for tasks
    that params.yaml does not know as image tasks.
    """
    params = load_params(params_file)
    root, heads = params_file.parent, tasks(model)
    if len(heads) < 2:
        raise ConfigError(
            "a joint label space takes two heads or more", where=str(model), hint="name a merged directory"
        )
    for task in heads:
        if task not in params.tasks or params.tasks[task].kind != KIND:
            raise ConfigError(
                f"head {task!r} has no image task",
                where=f"{params_file}: tasks",
                hint=f"give it kind: {KIND}",
            )
    specs = {}
    for task in heads:
        spec = DatasetSpec.of_task(params.tasks[task], root)
        specs[task] = replace(spec, split=split or spec.split, columns={**spec.columns, **columns})
    evaluate = params.evaluate if metric is None else params.evaluate.with_metric(metric)
    experts = {task: root / "models" / params.tasks[task].model for task in heads}
    base = base_for(model, None, root)
    systems = {MODEL: {task: System(MODEL, model, task=task, base=base) for task in heads}}
    if all(folder.is_dir() for folder in experts.values()):
        alone = {t: System(ENSEMBLE, folder, base=base_for(folder, None, root)) for t, folder in experts.items()}
        systems = {ENSEMBLE: alone, **systems}
    return _scored(systems, _Rows.of(specs, model), experts, evaluate)


@dataclass(frozen=True)
class _Rows:
    """The rows of all tasks in one sequence: the range of each task, and classes numbered across all tasks."""

    sets: Mapping[str, Rows]
    spaces: Mapping[str, LabelSpace]

    @classmethod
    def of(cls, specs: Mapping[str, DatasetSpec], model: Path) -> _Rows:
        sets = {task: kind_of(KIND).read(spec) for task, spec in specs.items()}
        return cls(sets, {task: classes_of(model, task, kind=KIND) for task in specs})

    @property
    def images(self) -> list[Any]:
        return [image for rows in self.sets.values() for image in rows.inputs]

    def spans(self) -> dict[str, tuple[slice, slice]]:
        """By task its rows, and its classes among all."""
        found, row, first = {}, 0, 0
        for task, rows in self.sets.items():
            size = len(self.spaces[task])
            found[task] = (slice(row, row + len(rows)), slice(first, first + size))
            row, first = row + len(rows), first + size
        return found

    def truth(self) -> NDArray[np.int64]:
        starts = {task: classes.start for task, (_, classes) in self.spans().items()}
        return np.concatenate([self.spaces[task].encode(rows, task) + starts[task] for task, rows in self.sets.items()])


def _scored(
    systems: Mapping[str, Mapping[str, System]], rows: _Rows, experts: Mapping[str, Path], evaluate: Evaluate
) -> JointScores:
    truth, images, spans = rows.truth(), rows.images, rows.spans()
    name = "+".join(rows.sets)
    settings = settings_of(1, evaluate)
    logits: dict[str, list[NDArray[np.float32]]] = {}
    with evaluation_progress(name, len(images) * sum(len(heads) for heads in systems.values())) as advance:
        for label, heads in systems.items():
            logits[label] = [_logits(one, experts[task], images, settings, advance) for task, one in heads.items()]
    predicted = {label: joint(found).classes for label, found in logits.items()}
    within = {
        task: {
            label: round(accuracy(truth[own], found[number][own].argmax(axis=1) + classes.start), 6)
            for label, found in logits.items()
        }
        for number, (task, (own, classes)) in enumerate(spans.items())
    }
    digests = {
        label: content_key({t: model_digest(one) for t, one in heads.items()}) for label, heads in systems.items()
    }
    scored = score_systems(
        truth,
        predicted,
        digests,
        evaluate.metric,
        Resampling(evaluate.bootstrap, evaluate.confidence, evaluate.seed),
        where=f"tasks {name}",
        reference=next(iter(systems)),
    )
    digest = content_key({task: found.digest() for task, found in rows.sets.items()})
    scores = TaskScores(
        task=name,
        dataset_digest=digest,
        rows=len(truth),
        metric=evaluate.metric,
        confidence=evaluate.confidence,
        bootstrap=evaluate.bootstrap,
        precision=PrecisionChoice(requested=evaluate.precision, used=settings.precision),
        systems=scored,
    )
    return JointScores(scores, within, {task: space.names for task, space in rows.spaces.items()})


def _logits(
    system: System, expert: Path, images: Sequence[Any], settings: Settings, advance: Callable[[int], None]
) -> NDArray[np.float32]:
    folders = [system.backbone, *([expert] if expert.is_dir() else [])]
    where = f"{system.name} ({system.backbone})"
    model = open_system(system, KIND)
    return image_logits(model, preprocessing(*folders), images, settings, advance, where)
