"""The evaluate stage: base, expert, baselines and the merge on one task, by the same code."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelweld.checkpoints.folding import base_for
from modelweld.checkpoints.loading import tasks
from modelweld.config import Evaluate, load_params
from modelweld.errors import CheckpointError, ConfigError, DiskFull, InputError
from modelweld.evaluation.cache import PredictionCache
from modelweld.evaluation.dataset_spec import DatasetSpec
from modelweld.evaluation.job import EvaluationJob
from modelweld.evaluation.kinds import kind_of
from modelweld.evaluation.predictions import write_predictions
from modelweld.evaluation.settings import settings_of
from modelweld.evaluation.systems import System, classes_of
from modelweld.formats.scores import EXPERT, MODEL, TaskScores
from modelweld.kinds import implied_by
from modelweld.settings import project_root

RESERVED = ("base", EXPERT, "merged", "row", "label")


def evaluate(task: str, params_file: Path, root: Path) -> dict[str, Any]:
    """Write scores/<task>.json and predictions/<task>.parquet; returns the scores document.

    Reads models/base, the task's expert, its dataset, merged/ and every folder of baselines/. The two files depend on
    these and on params.yaml alone: predictions that were kept from an earlier run change the time, not a byte.
    """
    params = load_params(params_file)
    if task not in params.tasks:
        raise ConfigError(f"no task {task!r}", where=str(params_file), hint=f"one of: {', '.join(params.tasks)}")
    spec = DatasetSpec.of_task(params.tasks[task], root)
    expert, base = root / "models" / params.tasks[task].model, root / "models" / "base"
    job = _job(task, spec, params.evaluate, root, expert, base=base)
    result = job.run(_systems(task, expert, root), EXPERT)
    columns = job.kind.prediction_columns(result.truth, result.ordered_predictions, job.space)
    with _writing(root):
        write_predictions(root / "predictions" / f"{task}.parquet", columns)
        result.scores.write(root / "scores" / f"{task}.json")
    return result.scores.data()


def evaluate_model(
    model: Path,
    spec: DatasetSpec,
    settings: Evaluate,
    *,
    task: str | None,
    expert: Path | None,
    root: Path,
    base: Path | None = None,
) -> TaskScores:
    """Scores of one model directory on some rows, as system "model"; writes nothing but the cache below `root`.

    `task` chooses the head of a merged directory. With `expert`, a second directory, scores are normalised by its; else
    the model is its own measure. Adapters are folded into `base`, by default the project's in `root`.
    """
    heads = tasks(model)
    if heads and task not in heads:
        missing = "it holds several heads" if task is None else f"no head for task {task!r}"
        raise ConfigError(missing, where=str(model), hint=f"--task: one of {', '.join(heads)}")
    head = task if heads else None
    own = base_for(model, base, root)
    job = _job(task or model.resolve().name, spec, settings, root, model, head=head, base=own)
    system = System(MODEL, model, task=head, base=own)
    if expert is None:
        return job.run([system], MODEL).scores
    expert_base = base_for(expert, base, root)
    if classes_of(expert, base=expert_base, kind=spec.kind) != job.space:
        raise CheckpointError(
            "its classes are not those of the model", where=str(expert), hint="name the expert of this very task"
        )
    return job.run([System(EXPERT, expert, base=expert_base), system], EXPERT).scores


def resolve_request(
    task: str | None,
    params_file: Path,
    changes: Mapping[str, Any],
    columns: Mapping[str, str],
    metric: str | None,
) -> tuple[DatasetSpec, Evaluate]:
    """Which rows to score and how: `changes` to a DatasetSpec, over the task in params.yaml, over the defaults.

    Changes that are None are left out; `columns` are by role. ConfigError where neither params.yaml (which need not
    exist, nor know the task) nor the changes name a dataset.
    """
    params = load_params(params_file) if params_file.is_file() else None
    given = {key: value for key, value in changes.items() if value is not None}
    settings = params.evaluate if params else Evaluate()
    if metric is not None:
        settings = settings.with_metric(metric)
    if (implied := implied_by(columns)) is not None:
        # Naming a column of images says that images are classified.
        given.setdefault("kind", implied)
    if params is not None and task in params.tasks:
        spec = DatasetSpec.of_task(params.tasks[task], params_file.parent)
    elif "dataset" in given:
        spec = DatasetSpec(dataset=str(given["dataset"]))
    else:
        raise ConfigError(
            "nothing says which dataset", where=str(params_file), hint="--dataset, or --task with a key of `tasks:`"
        )
    return replace(spec, **given, columns={**spec.columns, **columns}), settings


def _job(
    name: str,
    spec: DatasetSpec,
    settings: Evaluate,
    root: Path,
    model: Path,
    *,
    head: str | None = None,
    base: Path | None,
) -> EvaluationJob:
    """The evaluation of these rows in the classes of `model`, or of one of its heads."""
    kind = kind_of(spec.kind)
    return EvaluationJob(
        task=name,
        kind=kind,
        rows=kind.read(spec),
        space=classes_of(model, head, base, spec.kind),
        settings=settings_of(spec.max_length, settings),
        evaluate=settings,
        cache=_cache(root),
    )


def _systems(task: str, expert: Path, root: Path) -> list[System]:
    """In reading order; the baselines are those on disk, which is what DVC tracks."""
    baselines = sorted(path for path in (root / "baselines").glob("*") if path.is_dir())
    for path in baselines:
        if path.name in RESERVED:
            raise ConfigError(
                f"a baseline may not be named {path.name!r}", where="baselines", hint="give it another name"
            )
    base = root / "models" / "base"
    return [
        System("base", base, head_from=expert, base=base),
        System(EXPERT, expert, base=base),
        *(System(path.name, path, task=task, base=base) for path in baselines),
        System("merged", root / "merged", task=task, base=base),
    ]


def _cache(root: Path) -> PredictionCache:
    project = project_root(root)
    return PredictionCache(project / ".modelweld" / "cache" / "predictions")


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("no space left for scores and predictions", where=str(root), hint="free space") from error
        raise InputError(f"cannot be written: {error.strerror}", where=str(error.filename or root)) from error
