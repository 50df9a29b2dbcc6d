"""The rows that models are run on: calibration rows without their labels, validation rows with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from modelweld.checkpoints.loading import load_tokenizer
from modelweld.config.align import Align, Rows
from modelweld.errors import MergeError
from modelweld.evaluation.dataset import EvaluationSet, read_set
from modelweld.evaluation.labels import LabelSpace
from modelweld.evaluation.predictors import Settings, choose_device, encode, predict
from modelweld.merging.engine.inputs import Expert

LEAST_ROWS = 16
_BATCH = 16
_VALIDATION_TOKENS = 4096


@dataclass(frozen=True)
class Calibration:
    """Batches of calibration rows as keyword calls, and what the record says of the rows."""

    batches: list[dict[str, Tensor]]
    record: dict[str, Any]


def calibration_of(settings: Align, reference: Path) -> Calibration:
    """The calibration rows, drawn evenly over their sets by the seed, as the model in `reference` takes its inputs.

    Raises MergeError for too few of them, InputError and ConfigError for a set that cannot be read.
    """
    named = settings.calibration or {}
    texts: list[str] = []
    for number, (name, rows) in enumerate(sorted(named.items())):
        share = settings.rows // len(named) + (number < settings.rows % len(named))
        texts += _drawn(read_set(rows.dataset, rows.split, rows.text, rows.text), share, settings.seed, name)
    if len(texts) < LEAST_ROWS:
        raise MergeError(
            f"{len(texts)} calibration rows are too few to correlate units by, at least {LEAST_ROWS}",
            where="align.calibration",
            mend="name more rows (a few hundred are enough), or set space: weights",
        )
    hasher = blake3()
    for text in texts:
        hasher.update(text.encode("utf-8", "surrogatepass") + b"\0")
    record = {"rows": len(texts), "sets": sorted(named), "digest": hasher.hexdigest()}
    tokenizer = load_tokenizer(reference)
    encoded = encode(tokenizer, texts, settings.max_length)
    order = sorted(range(len(texts)), key=lambda row: (len(encoded["input_ids"][row]), row))
    batches = []
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        part = {name: [values[row] for row in chosen] for name, values in encoded.items()}
        batches.append(dict(tokenizer.pad(part, return_tensors="pt")))
    return Calibration(batches, record)


def accuracy_on(rows: Rows, settings: Align, task: str, expert: Expert, reference: Path) -> Callable[[Any], float]:
    """What gives a model's accuracy on the first validation rows of a task, in the classes of that task's expert."""
    chosen = _first(rows, settings, task)
    truth = LabelSpace.from_config(expert.checkpoint.config, str(expert.checkpoint.path)).encode(chosen, task)
    how = Settings(settings.max_length, _VALIDATION_TOKENS, choose_device("cpu"))
    tokenizer = load_tokenizer(reference)
    encoded = encode(tokenizer, chosen.texts, settings.max_length)

    def accuracy(model: Any) -> float:
        guessed = predict(model, tokenizer, encoded, how, lambda _: None, f"validation rows of {task}")
        return float((guessed.classes == truth).mean())

    return accuracy


def _drawn(rows: EvaluationSet, count: int, seed: int, name: str) -> list[str]:
    if not len(rows):
        raise MergeError("has no rows", where=f"align.calibration.{name}", mend="fetch it again")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:count].tolist()
    return [rows.texts[row] for row in sorted(chosen)]


def _first(rows: Rows, settings: Align, task: str) -> EvaluationSet:
    every = read_set(rows.dataset, rows.split, rows.text, rows.label)
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = sorted(torch.randperm(len(every), generator=generator)[: settings.validation_rows].tolist())
    if not chosen:
        raise MergeError("has no rows", where=f"align.validation.{task}", mend="fetch it again")
    return replace(
        every, texts=tuple(every.texts[row] for row in chosen), labels=tuple(every.labels[row] for row in chosen)
    )
