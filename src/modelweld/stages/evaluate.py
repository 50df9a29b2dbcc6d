"""The evaluate stage: base, expert, baselines and the merge on one task, by the same code."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modelweld.checkpoints.folding import base_for
from modelweld.checkpoints.loading import config_of, load_tokenizer, tasks
from modelweld.config import Evaluate, Task, load_params
from modelweld.errors import CheckpointError, ConfigError, DiskFull, InputError
from modelweld.evaluation.cache import PredictionCache, Predictions
from modelweld.evaluation.dataset import EvaluationSet, read_set
from modelweld.evaluation.images import ImageSet, Preprocessing, chosen, image_logits, preprocessing, read_images
from modelweld.evaluation.labels import Classes, LabelSpace
from modelweld.evaluation.metrics import Resampling, score_systems
from modelweld.evaluation.predictions import write_predictions
from modelweld.evaluation.predictors import (
    Kind,
    Settings,
    System,
    choose_device,
    encode,
    model_digest,
    open_system,
    predict,
    prediction_key,
    tokenizer_digest,
)
from modelweld.evaluation.scores import EXPERT, TaskScores, reading_order, write_scores
from modelweld.hardware import PrecisionChoice, choose_precision

MODEL = "model"
RESERVED = ("base", EXPERT, "merged", "row", "label")


@dataclass(frozen=True)
class Sample:
    """Rows to score: where they are, which columns, and where longer texts are cut."""

    dataset: str
    split: str = "test"
    text: str = "text"
    label: str = "label"
    max_length: int = 128
    kind: Kind = "text-classification"
    image: str = "image"

    @classmethod
    def of(cls, spec: Task, root: Path) -> Self:
        """The sample of a task in params.yaml, as `fetch` put it below `root`."""
        dataset = str(root / "datasets" / spec.dataset)
        return cls(dataset, spec.split, spec.text, spec.label, spec.max_length, spec.kind, spec.image)

    def read(self) -> EvaluationSet | ImageSet:
        """The rows."""
        if self.kind == "image-classification":
            return read_images(self.dataset, self.split, self.image, self.label)
        return read_set(self.dataset, self.split, self.text, self.label)


@dataclass(frozen=True)
class Trial:
    """One set of rows, and all that predicting them needs beside the systems."""

    task: str
    rows: EvaluationSet | ImageSet
    space: LabelSpace
    settings: Settings
    cache: PredictionCache


@dataclass(frozen=True)
class Outcome:
    """What a trial gave: the truth, each system's predictions, and the scores."""

    truth: Classes
    predictions: dict[str, Predictions]
    scores: TaskScores


def evaluate(task: str, params_file: Path, root: Path) -> dict[str, Any]:
    """Write scores/<task>.json and predictions/<task>.parquet; returns the scores document.

    Reads models/base, the task's expert, its dataset, merged/ and every folder of baselines/. The two files depend on
    these and on params.yaml alone: predictions that were kept from an earlier run change the time, not a byte.
    """
    params = load_params(params_file)
    if task not in params.tasks:
        raise ConfigError(f"no task {task!r}", where=str(params_file), hint=f"one of: {', '.join(params.tasks)}")
    sample = Sample.of(params.tasks[task], root)
    expert, base = root / "models" / params.tasks[task].model, root / "models" / "base"
    trial = Trial(
        task=task,
        rows=sample.read(),
        space=classes_of(expert, base=base),
        settings=settings_of(sample.max_length, params.evaluate),
        cache=_cache(root),
    )
    outcome = _run(trial, _systems(task, expert, root), params.evaluate, EXPERT)
    with _writing(root):
        write_predictions(root / "predictions" / f"{task}.parquet", trial.space, outcome.truth, outcome.predictions)
        write_scores(outcome.scores, root / "scores" / f"{task}.json")
    return outcome.scores.to_dict()


def evaluate_model(
    model: Path,
    sample: Sample,
    how: Evaluate,
    *,
    task: str | None,
    expert: Path | None,
    root: Path,
    base: Path | None = None,
) -> TaskScores:
    """Scores of one model directory on one sample, as system "model"; writes nothing but the cache below `root`.

    `task` chooses the head of a merged directory. With `expert`, a second directory, scores are normalised by its; else
    the model is its own measure. Adapters are folded into `base`, by default the project's in `root`.
    """
    heads = tasks(model)
    if heads and task not in heads:
        missing = "it holds several heads" if task is None else f"no head for task {task!r}"
        raise ConfigError(missing, where=str(model), hint=f"--task: one of {', '.join(heads)}")
    own = base_for(model, base, root)
    classes = classes_of(model, task if heads else None, own)
    trial = Trial(
        task=task or model.resolve().name,
        rows=sample.read(),
        space=classes,
        settings=settings_of(sample.max_length, how),
        cache=_cache(root),
    )
    system = System(MODEL, model, task=task if heads else None, base=own)
    if expert is None:
        return _run(trial, [system], how, MODEL).scores
    theirs = base_for(expert, base, root)
    if classes_of(expert, base=theirs) != classes:
        raise CheckpointError(
            "its classes are not those of the model", where=str(expert), hint="name the expert of this very task"
        )
    return _run(trial, [System(EXPERT, expert, base=theirs), system], how, EXPERT).scores


def asked(
    task: str | None, params_file: Path, changes: Mapping[str, Any], metric: str | None
) -> tuple[Sample, Evaluate]:
    """What to score and how: fields of Sample in `changes`, over the task in params.yaml, over the defaults.

    Fields that are None are not said. Without params.yaml, or for a task unknown to it, the dataset must be.
    """
    params = load_params(params_file) if params_file.is_file() else None
    said = {key: value for key, value in changes.items() if value is not None}
    how = params.evaluate if params else Evaluate()
    if metric is not None:
        how = Evaluate.model_validate(how.model_dump() | {"metric": metric})
    if "image" in said:
        # Who names a column of images does not mean texts.
        said.setdefault("kind", "image-classification")
    if params is not None and task in params.tasks:
        known = Sample.of(params.tasks[task], params_file.parent)
    elif "dataset" in said:
        known = Sample(dataset=str(said["dataset"]))
    else:
        raise ConfigError(
            "nothing says which dataset", where=str(params_file), hint="--dataset, or --task with a key of `tasks:`"
        )
    return replace(known, **said), how


def _run(trial: Trial, systems: Sequence[System], how: Evaluate, reference: str) -> Outcome:
    truth = trial.space.encode(trial.rows, trial.task)
    digests = {system.name: model_digest(system) for system in systems}
    predictions = _predict_all(trial, systems, digests)
    scored = score_systems(
        truth,
        {name: found.classes for name, found in predictions.items()},
        digests,
        how.metric,
        Resampling(how.bootstrap, how.confidence, how.seed),
        where=f"task {trial.task}",
        reference=reference,
    )
    scores = TaskScores(
        task=trial.task,
        dataset_digest=trial.rows.digest(),
        rows=len(trial.rows),
        metric=how.metric,
        confidence=how.confidence,
        bootstrap=how.bootstrap,
        precision=PrecisionChoice(how.precision, trial.settings.precision),
        systems={name: scored[name] for name in reading_order(scored)},
    )
    return Outcome(truth, predictions, scores)


def _predict_all(trial: Trial, systems: Sequence[System], digests: dict[str, str]) -> dict[str, Predictions]:
    make: Callable[[Trial, System, Callable[[int], None]], Predictions]
    read_by: Callable[[System], str]
    if isinstance(trial.rows, ImageSet):
        # A merge without a processor file of its own is fed as the task's expert was.
        own = [path for system in systems if system.name == EXPERT for path in (system.backbone, system.side_files)]
        looks = {system.name: preprocessing(system.side_files, *own) for system in systems}
        make, read_by = _image_predictor(trial.rows, looks), lambda system: looks[system.name].digest
    else:
        make, read_by = _text_predictor(trial.rows), lambda system: tokenizer_digest(system.side_files)
    dataset = trial.rows.digest()
    predictions: dict[str, Predictions] = {}
    with progress_of(trial.task, len(systems) * len(trial.rows)) as advance:
        for system in systems:
            key = prediction_key(system, digests[system.name], read_by(system), dataset, trial.space, trial.settings)
            found = trial.cache.get(key, len(trial.rows))
            if found is None:
                found = make(trial, system, advance)
                trial.cache.put(key, found)
            else:
                advance(len(trial.rows))
            predictions[system.name] = found
    return predictions


def _text_predictor(rows: EvaluationSet) -> Callable[[Trial, System, Callable[[int], None]], Predictions]:
    encoded: dict[str, dict[str, list[list[int]]]] = {}

    def make(trial: Trial, system: System, advance: Callable[[int], None]) -> Predictions:
        model = open_system(system)
        _check_classes(model, trial.space, system)
        tokenizer, tokens = load_tokenizer(system.side_files), tokenizer_digest(system.side_files)
        # Systems that share a tokenizer share its work.
        if tokens not in encoded:
            encoded[tokens] = encode(tokenizer, rows.texts, trial.settings.max_length)
        return predict(model, tokenizer, encoded[tokens], trial.settings, advance, _where(trial, system))

    return make


def _image_predictor(
    rows: ImageSet, looks: Mapping[str, Preprocessing]
) -> Callable[[Trial, System, Callable[[int], None]], Predictions]:
    def make(trial: Trial, system: System, advance: Callable[[int], None]) -> Predictions:
        model = open_system(system, "image-classification")
        _check_classes(model, trial.space, system)
        where = _where(trial, system)
        return chosen(image_logits(model, looks[system.name], rows.images, trial.settings, advance, where))

    return make


def _where(trial: Trial, system: System) -> str:
    return f"task {trial.task}, {system.name} ({system.backbone})"


def _check_classes(model: Any, space: LabelSpace, system: System) -> None:
    own = LabelSpace.from_config(model.config.to_dict(), str(system.backbone))
    if own != space:
        raise CheckpointError(
            f"its head has the classes {list(own.names)}, the expert's {list(space.names)}",
            where=str(system.backbone),
            hint="merge again: heads are taken from the experts as they are",
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
        System("base", base, head=expert, base=base),
        System(EXPERT, expert, base=base),
        *(System(path.name, path, task=task, base=base) for path in baselines),
        System("merged", root / "merged", task=task, base=base),
    ]


def classes_of(model: Path, task: str | None = None, base: Path | None = None) -> LabelSpace:
    """The classes of a model's head, or of that of one task; InputError where nothing names them."""
    document = config_of(model, task, base)
    if not document:
        raise InputError(
            "no config.json, so nothing says which classes its head has",
            where=str(model),
            hint="name a task that the model has a head for: the folders of heads/",
        )
    return LabelSpace.from_config(document, str(model))


def settings_of(max_length: int, how: Evaluate) -> Settings:
    """How predictions are made here: by `evaluate:`, on the device that MODELWELD_DEVICE names.

    The precision is the one that pays off on that device, which may not be the one that was asked for.
    """
    # A merge takes all devices of a list, one process each; an evaluation is one process.
    device = choose_device((os.environ.get("MODELWELD_DEVICE") or "auto").partition(",")[0])
    return Settings(max_length, how.batch_tokens, device, choose_precision(how.precision, device).used)


def _cache(root: Path) -> PredictionCache:
    project = Path(os.environ.get("MODELWELD_PROJECT_ROOT") or root)
    return PredictionCache(project / ".modelweld" / "cache" / "predictions")


@contextmanager
def progress_of(task: str, rows: int) -> Iterator[Callable[[int], None]]:
    """One bar for all systems; transformers' own bar for each model it loads would tear it."""
    from transformers.utils import logging

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(f"evaluate {task}", total=rows)
            yield lambda done: progress.advance(bar, done)
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("no space left for scores and predictions", where=str(root), hint="free space") from error
        raise InputError(f"cannot be written: {error.strerror}", where=str(error.filename or root)) from error
