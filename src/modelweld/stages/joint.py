"""Image tasks scored together: every head answers every row, and the classes of all heads stand side by side."""

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
from modelweld.evaluation.images import ImageSet, image_logits, joint, preprocessing
from modelweld.evaluation.labels import LabelSpace
from modelweld.evaluation.metrics import Resampling, accuracy, score_systems
from modelweld.evaluation.predictors import Settings, System, model_digest, open_system
from modelweld.evaluation.scores import TaskScores
from modelweld.hardware import PrecisionChoice
from modelweld.stages.evaluate import MODEL, Sample, classes_of, progress_of, settings_of

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class JointScores:
    """Scores over the classes of all tasks, and each system's accuracy within every task's own classes."""

    scores: TaskScores
    within: Mapping[str, Mapping[str, float]]
    classes: Mapping[str, Sequence[str]]

    def to_dict(self) -> dict[str, Any]:
        """One JSON document: that of the scores, with what stands beside them."""
        own = {"within": {name: dict(found) for name, found in self.within.items()}}
        return self.scores.to_dict() | own | {"classes": {task: list(names) for task, names in self.classes.items()}}


def evaluate_joint(model: Path, params_file: Path, changes: Mapping[str, Any], metric: str | None) -> JointScores:
    """The joint scores of a merged directory, as system "model", on the rows of all its heads' tasks together.

    Where the tasks' experts are in models/ their logits side by side are the system "ensemble", which scores are
    normalised by. The heads were trained apart and nothing made their logits comparable: this asks more than each task
    alone. Raises ConfigError for fewer than two heads and for tasks that params.yaml does not know as image tasks.
    """
    params = load_params(params_file)
    root, heads = params_file.parent, tasks(model)
    if len(heads) < 2:
        raise ConfigError(
            "a joint label space takes two heads or more", where=str(model), hint="name a merged directory"
        )
    for task in heads:
        if task not in params.tasks or params.tasks[task].kind != "image-classification":
            raise ConfigError(
                f"head {task!r} has no image task",
                where=f"{params_file}: tasks",
                hint="give it kind: image-classification",
            )
    said = {key: value for key, value in changes.items() if value is not None}
    samples = {task: replace(Sample.of(params.tasks[task], root), **said) for task in heads}
    how = (
        params.evaluate
        if metric is None
        else Evaluate.model_validate(params.evaluate.model_dump() | {"metric": metric})
    )
    experts = {task: root / "models" / params.tasks[task].model for task in heads}
    base = base_for(model, None, root)
    systems = {MODEL: {task: System(MODEL, model, task=task, base=base) for task in heads}}
    if all(folder.is_dir() for folder in experts.values()):
        alone = {t: System(ENSEMBLE, folder, base=base_for(folder, None, root)) for t, folder in experts.items()}
        systems = {ENSEMBLE: alone, **systems}
    return _scored(systems, _Rows.of(samples, model), experts, how)


@dataclass(frozen=True)
class _Rows:
    """The rows of all tasks one after the other: where each task's are, and their classes counted through."""

    sets: Mapping[str, ImageSet]
    spaces: Mapping[str, LabelSpace]

    @classmethod
    def of(cls, samples: Mapping[str, Sample], model: Path) -> _Rows:
        sets = {}
        for task, sample in samples.items():
            found = sample.read()
            if not isinstance(found, ImageSet):
                raise ConfigError(f"task {task} has texts", where="--kind", hint="score texts task by task")
            sets[task] = found
        return cls(sets, {task: classes_of(model, task) for task in samples})

    @property
    def images(self) -> list[Any]:
        return [image for rows in self.sets.values() for image in rows.images]

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
    systems: Mapping[str, Mapping[str, System]], rows: _Rows, experts: Mapping[str, Path], how: Evaluate
) -> JointScores:
    truth, images, spans = rows.truth(), rows.images, rows.spans()
    name = "+".join(rows.sets)
    settings = settings_of(1, how)
    logits: dict[str, list[NDArray[np.float32]]] = {}
    with progress_of(name, len(images) * sum(len(heads) for heads in systems.values())) as advance:
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
        how.metric,
        Resampling(how.bootstrap, how.confidence, how.seed),
        where=f"tasks {name}",
        reference=next(iter(systems)),
    )
    digest = content_key({task: found.digest() for task, found in rows.sets.items()})
    precision = PrecisionChoice(how.precision, settings.precision)
    scores = TaskScores(name, digest, len(truth), how.metric, how.confidence, how.bootstrap, scored, precision)
    return JointScores(scores, within, {task: space.names for task, space in rows.spaces.items()})


def _logits(
    system: System, expert: Path, images: Sequence[Any], settings: Settings, advance: Callable[[int], None]
) -> NDArray[np.float32]:
    folders = [system.backbone, *([expert] if expert.is_dir() else [])]
    where = f"{system.name} ({system.backbone})"
    model = open_system(system, "image-classification")
    return image_logits(model, preprocessing(*folders), images, settings, advance, where)
