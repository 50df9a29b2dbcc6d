"""Predicting with a registered version: texts in, a label and its probability out, one head at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pandas as pd

from modelweld.errors import InputError
from modelweld.registry.address import DvcAddress
from modelweld.registry.materialise import materialise

TEXT = "text"
BATCH_ROWS = 64
MAX_LENGTH = 512


class Predictor:
    """A merged directory that predicts; each head is loaded at its first use and kept."""

    def __init__(self, directory: Path, tasks: Mapping[str, int], device: str = "cpu") -> None:
        """`tasks` maps each head to the number of tokens its texts are cut to."""
        self.directory = directory
        self.tasks = dict(tasks)
        self.device = device
        self._loaded: dict[str, tuple[Any, Any]] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The predictor that a version's model_config describes; brings the weights here."""
        address = DvcAddress.from_mapping(config["dvc"], "model_config")
        return cls(materialise(address), config["tasks"], _device())

    def predict(self, rows: Any, task: str | None = None) -> pd.DataFrame:
        """Columns label and confidence, a row each for `rows`: a frame with a column `text`, or a list of strings."""
        import torch

        texts = _texts(rows)
        chosen = self._choose(task)
        tokenizer, model = self._load(chosen)
        names = model.config.id2label
        labels, confidences = [""] * len(texts), [0.0] * len(texts)
        # Texts of like length go together, so that little of a batch is padding.
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for start in range(0, len(order), BATCH_ROWS):
            batch = order[start : start + BATCH_ROWS]
            encoded = tokenizer(
                [texts[row] for row in batch],
                padding=True,
                truncation=True,
                max_length=self.tasks[chosen],
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                best = model(**encoded).logits.float().softmax(dim=-1).max(dim=-1)
            for row, index, probability in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True):
                labels[row], confidences[row] = str(names[index]), probability
        return pd.DataFrame({"label": labels, "confidence": confidences})

    def _choose(self, task: str | None) -> str:
        known = ", ".join(sorted(self.tasks))
        if task:
            if task not in self.tasks:
                raise InputError(f"no head for task {task!r}", where="params", hint=f"one of: {known}")
            return task
        if len(self.tasks) != 1:
            hint = f'predict(rows, params={{"task": …}}) with one of: {known}'
            raise InputError("this model has several heads; say which", where="params", hint=hint)
        return next(iter(self.tasks))

    def _load(self, task: str) -> tuple[Any, Any]:
        if task not in self._loaded:
            from modelweld.checkpoints.loading import load, load_tokenizer

            model = load(self.directory, task, device=self.device).eval()
            self._loaded[task] = (load_tokenizer(self.directory), model)
        return self._loaded[task]


def _texts(rows: Any) -> list[str]:
    if isinstance(rows, pd.DataFrame):
        if TEXT not in rows.columns:
            columns = ", ".join(str(column) for column in rows.columns)
            raise InputError(f"no column {TEXT!r} among: {columns}", where="model_input", hint=f"rename it to {TEXT!r}")
        rows = rows[TEXT]
    if isinstance(rows, Mapping):
        return _texts(pd.DataFrame(rows))
    values: Sequence[Any] = [rows] if isinstance(rows, str) else list(rows)
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise InputError(f"row {number} is not text but {type(value).__name__}", where="model_input")
    return [str(value) for value in values]


def _device() -> str:
    import torch

    wanted = (os.environ.get("MODELWELD_DEVICE") or "auto").partition(",")[0]
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"
