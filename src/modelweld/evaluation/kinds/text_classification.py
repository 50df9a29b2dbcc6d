"""Text classification: one class per text, by `…ForSequenceClassification` models."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import torch
from torch import Tensor

from modelweld.checkpoints.loading import load_tokenizer
from modelweld.errors import ConfigError, InputError
from modelweld.evaluation.cache import Predictions
from modelweld.evaluation.dataset import EvaluationSet, read_set
from modelweld.evaluation.dataset_spec import DatasetSpec
from modelweld.evaluation.kinds.base import Advance, ClassificationKind, Inspection, Pick, Server
from modelweld.evaluation.settings import Settings
from modelweld.evaluation.texts import TOKENIZER_FILES, encode, predict, tokenizer_digest

CALIBRATION_BATCH = 16
SERVED_BATCH = 64


@dataclass(frozen=True)
class Encoded:
    """Texts as token ids and masks, with the tokenizer that pads them."""

    tokenizer: Any
    columns: dict[str, list[list[int]]]


class TextClassification(ClassificationKind):
    """Rows of a text and a label."""

    name = "text-classification"
    architecture = "ForSequenceClassification"
    noun = "texts"
    finding_types = {"text": None}  # noqa: RUF012

    def read(self, spec: DatasetSpec, pick: Pick | None = None) -> EvaluationSet:
        """Texts and raw labels."""
        rows = read_set(spec.dataset, spec.split, spec.column("text"), spec.column("label"))
        return rows if pick is None else rows.only(pick(len(rows)))

    def read_inputs(self, spec: DatasetSpec, pick: Pick | None = None) -> Sequence[str]:
        """The texts."""
        text = spec.column("text")
        rows = read_set(spec.dataset, spec.split, text, text)
        return rows.texts if pick is None else rows.only(pick(len(rows))).texts

    def fingerprint(self, value: Any) -> bytes:
        """The text itself."""
        return str(value).encode("utf-8", "surrogatepass")

    def inspect(self, cells: Mapping[str, Any]) -> Inspection:
        """Two texts are the same after Unicode NFKC, case folding and with white space run together."""
        return Inspection(identity_of(cells["text"]), {"text": cells["text"]})

    def inputs_digest(self, folders: Sequence[Path]) -> str:
        """That of the tokenizer's files."""
        return tokenizer_digest(folders[0])

    def prepare(self, inputs: Sequence[Any], folders: Sequence[Path], settings: Settings) -> Encoded:
        """Token ids, cut to `settings.max_length`."""
        tokenizer = load_tokenizer(folders[0])
        return Encoded(tokenizer, encode(tokenizer, inputs, settings.max_length))

    def predict(self, model: Any, prepared: Any, settings: Settings, advance: Advance, where: str) -> Predictions:
        """The class of every text and its probability."""
        return predict(model, prepared.tokenizer, prepared.columns, settings, advance, where)

    def calibration_batches(
        self, inputs: Sequence[Any], folders: Sequence[Path], max_length: int, seed: int
    ) -> list[dict[str, Tensor]]:
        """Batches of texts of like length."""
        if not any((folders[0] / name).is_file() for name in TOKENIZER_FILES):
            raise ConfigError(
                f"names texts, and there is no tokenizer in {folders[0]}",
                where="align.calibration",
                hint="`image:` names a column of images",
            )
        tokenizer = load_tokenizer(folders[0])
        encoded = encode(tokenizer, inputs, max_length)
        order = sorted(range(len(inputs)), key=lambda row: (len(encoded["input_ids"][row]), row))
        batches = []
        for start in range(0, len(order), CALIBRATION_BATCH):
            chosen = order[start : start + CALIBRATION_BATCH]
            part = {name: [values[row] for row in chosen] for name, values in encoded.items()}
            batches.append(dict(tokenizer.pad(part, return_tensors="pt")))
        return batches

    def served_rows(self, model_input: Any) -> list[Any]:
        """A frame or a mapping with a column `text`, a list of strings, or one string."""
        if isinstance(model_input, Mapping):
            model_input = pandas.DataFrame(model_input)
        if isinstance(model_input, pandas.DataFrame):
            if "text" not in model_input.columns:
                columns = ", ".join(str(column) for column in model_input.columns)
                raise InputError(f"no column 'text' among: {columns}", where="model_input", hint="rename it to 'text'")
            model_input = model_input["text"]
        values = [model_input] if isinstance(model_input, str) else list(model_input)
        for number, value in enumerate(values):
            if not isinstance(value, str):
                raise InputError(f"row {number} is not text but {type(value).__name__}", where="model_input")
        return [str(value) for value in values]

    def server(self, model: Any, folder: Path, max_length: int, device: str) -> Server:
        """Labels and probabilities; texts are cut to `max_length` tokens."""
        tokenizer, names = load_tokenizer(folder), model.config.id2label

        def answer(texts: Sequence[Any]) -> pandas.DataFrame:
            labels, confidences = [""] * len(texts), [0.0] * len(texts)
            # Texts of like length go together, to minimise padding.
            order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
            for start in range(0, len(order), SERVED_BATCH):
                batch = order[start : start + SERVED_BATCH]
                chosen = [texts[row] for row in batch]
                encoded = tokenizer(
                    chosen, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
                ).to(device)
                with torch.inference_mode():
                    best = model(**encoded).logits.float().softmax(dim=-1).max(dim=-1)
                for row, index, probability in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True):
                    labels[row], confidences[row] = str(names[index]), probability
            return pandas.DataFrame({"label": labels, "confidence": confidences})

        return answer


def identity_of(text: Any) -> str:
    """What two texts have in common when a reader would call them the same; empty for no text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()) if isinstance(text, str) else ""


KIND = TextClassification()
