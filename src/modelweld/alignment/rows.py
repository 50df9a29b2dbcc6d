"""The rows that models are run on: calibration rows without their labels, validation rows with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from modelweld.config.align import Align, Rows
from modelweld.engine import Inputs
from modelweld.engine.plan.inputs import Expert
from modelweld.errors import ConfigError, MergeError
from modelweld.evaluation.dataset_spec import DatasetSpec
from modelweld.evaluation.kinds import kind_of
from modelweld.evaluation.settings import Settings, choose_device
from modelweld.formats.alignment import CalibrationRows
from modelweld.kinds import KINDS

LEAST_ROWS = 16
_VALIDATION_TOKENS = 4096


@dataclass(frozen=True)
class Calibration:
    """Batches of calibration rows as keyword calls, and what the record says of the rows."""

    batches: list[dict[str, Tensor]]
    record: CalibrationRows


def calibration_of(settings: Align, inputs: Inputs) -> Calibration:
    """The calibration rows, drawn evenly over their sets by the seed, as the models take their inputs.

    Raises MergeError for too few of them, ConfigError for both texts and images, InputError for what cannot be read.
    """
    named = dict(sorted((settings.calibration or {}).items()))
    if len({KINDS[rows.task_kind].modality for rows in named.values()}) > 1:
        raise ConfigError(
            "names rows of texts and rows of images, and no model takes both",
            where="align.calibration",
            hint="keep those that these models are made for",
        )
    by_kind: dict[str, list[Any]] = {}
    hasher, count = blake3(), 0
    for rows, share in _shares(settings, named):
        kind = kind_of(rows.task_kind)
        spec = DatasetSpec.of_rows(rows, settings.max_length)
        values = kind.read_inputs(spec, partial(draw, wanted=share, seed=settings.seed))
        by_kind.setdefault(rows.task_kind, []).extend(values)
        count += len(values)
        for value in values:
            hasher.update(kind.fingerprint(value) + b"\0")
    if count < LEAST_ROWS:
        raise MergeError(
            f"{count} calibration rows are too few to correlate units by, at least {LEAST_ROWS}",
            where="align.calibration",
            hint="name more rows (a few hundred are enough), or set space: weights",
        )
    folders = _folders(inputs.reference.path, *(expert.checkpoint.path for expert in inputs.experts))
    batches = [
        batch
        for name, values in by_kind.items()
        for batch in kind_of(name).calibration_batches(values, folders, settings.max_length, settings.seed)
    ]
    return Calibration(batches, CalibrationRows(rows=count, sets=tuple(sorted(named)), digest=hasher.hexdigest()))


def call_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """A batch as the keywords that this model's forward takes; ConfigError for texts to a model of images."""
    taken = inspect.signature(model.forward).parameters
    call: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name in taken}
    if not call:
        raise ConfigError(
            f"a {type(model).__name__} takes no {', '.join(batch)}",
            where="align.calibration",
            hint="`text:` names a column of texts, `image:` one of images",
        )
    if "decoder_input_ids" in taken:
        call["decoder_input_ids"] = call["input_ids"]
    return call | ({"use_cache": False} if "use_cache" in taken else {})


def accuracy_on(rows: Rows, settings: Align, task: str, expert: Expert, inputs: Inputs) -> Callable[[Any], float]:
    """A function from a model to its accuracy on validation rows of a task, in the classes of that task's expert."""
    kind = kind_of(rows.task_kind)
    found = kind.read(
        DatasetSpec.of_rows(rows, settings.max_length),
        partial(draw, wanted=settings.validation_rows, seed=settings.seed),
    )
    space = kind.classes(expert.checkpoint.config, str(expert.checkpoint.path))
    truth = kind.truth(found, space, task)
    limits = Settings(settings.max_length, _VALIDATION_TOKENS, choose_device("cpu"))
    prepared = kind.prepare(found.inputs, _folders(inputs.reference.path, expert.checkpoint.path), limits)

    def accuracy(model: Any) -> float:
        where = f"validation rows of {task}"
        predictions = kind.predict(model, prepared, limits, lambda _: None, where)
        return float((predictions.classes == truth).mean())

    return accuracy


def draw(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `count` row numbers in rising order, by the seed; all where there are no more."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=generator)[:wanted].tolist())


_Shares = Sequence[tuple[Rows, int]]


def _shares(settings: Align, named: Mapping[str, Rows]) -> _Shares:
    """How many rows each set gives, the first ones one more where they do not divide."""
    return [
        (rows, settings.rows // len(named) + (number < settings.rows % len(named)))
        for number, rows in enumerate(named.values())
    ]


def _folders(*paths: Path) -> list[Path]:
    return [path if path.is_dir() else path.parent for path in paths]
