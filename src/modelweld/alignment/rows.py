"""The rows that models are run on: calibration rows without their labels, validation rows with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from modelweld.checkpoints.loading import load_tokenizer
from modelweld.config.align import Align, Rows
from modelweld.engine import Inputs
from modelweld.engine.inputs import Expert
from modelweld.errors import ConfigError, MergeError
from modelweld.evaluation.dataset import EvaluationSet, read_set
from modelweld.evaluation.images import image_logits, preprocessing, read_images, read_unlabelled
from modelweld.evaluation.labels import LabelSpace
from modelweld.evaluation.predictors import TOKENIZER_FILES, Settings, choose_device, encode, predict
from modelweld.images import fingerprint

LEAST_ROWS = 16
TEXT_BATCH = 16
IMAGE_BATCH = 64
_VALIDATION_TOKENS = 4096


@dataclass(frozen=True)
class Calibration:
    """Batches of calibration rows as keyword calls, and what the record says of the rows."""

    batches: list[dict[str, Tensor]]
    record: dict[str, Any]


def calibration_of(settings: Align, inputs: Inputs) -> Calibration:
    """The calibration rows, drawn evenly over their sets by the seed, as the models take their inputs.

    Raises MergeError for too few of them, ConfigError for both texts and images, InputError for what cannot be read.
    """
    named = dict(sorted((settings.calibration or {}).items()))
    if len({rows.image is None for rows in named.values()}) > 1:
        raise ConfigError(
            "names rows of texts and rows of images, and no model takes both",
            where="align.calibration",
            hint="keep those that these models are made for",
        )
    shares = _shares(settings, named)
    images = any(rows.image is not None for rows in named.values())
    batches, prints = (_images if images else _texts)(settings, shares, inputs)
    if len(prints) < LEAST_ROWS:
        raise MergeError(
            f"{len(prints)} calibration rows are too few to correlate units by, at least {LEAST_ROWS}",
            where="align.calibration",
            hint="name more rows (a few hundred are enough), or set space: weights",
        )
    hasher = blake3()
    for one in prints:
        hasher.update(one + b"\0")
    return Calibration(batches(), {"rows": len(prints), "sets": sorted(named), "digest": hasher.hexdigest()})


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
    space = LabelSpace.from_config(expert.checkpoint.config, str(expert.checkpoint.path))
    limits = Settings(settings.max_length, _VALIDATION_TOKENS, choose_device("cpu"))
    where = f"validation rows of {task}"

    pick = partial(draw, wanted=settings.validation_rows, seed=settings.seed)
    if rows.image is not None:
        pictures = read_images(rows.dataset, rows.split, rows.image, rows.label, pick)
        preprocessors, right = (
            preprocessing(*_folders(inputs.reference.path, expert.checkpoint.path)),
            space.encode(pictures, task),
        )

        def seen(model: Any) -> float:
            logits = image_logits(model, preprocessors, pictures.images, limits, lambda _: None, where)
            return float((logits.argmax(axis=1) == right).mean())

        return seen
    every = read_set(rows.dataset, rows.split, rows.text, rows.label)
    chosen = _only(every, pick(len(every)))
    truth = space.encode(chosen, task)
    tokenizer = load_tokenizer(inputs.reference.path)
    encoded = encode(tokenizer, chosen.texts, settings.max_length)

    def read(model: Any) -> float:
        guessed = predict(model, tokenizer, encoded, limits, lambda _: None, where)
        return float((guessed.classes == truth).mean())

    return read


def draw(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `count` row numbers in rising order, by the seed; all where there are no more."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=generator)[:wanted].tolist())


Batches = Callable[[], list[dict[str, Tensor]]]
_Shares = Sequence[tuple[Rows, int]]


def _shares(settings: Align, named: Mapping[str, Rows]) -> _Shares:
    """How many rows each set gives, the first ones one more where they do not divide."""
    return [
        (rows, settings.rows // len(named) + (number < settings.rows % len(named)))
        for number, rows in enumerate(named.values())
    ]


def _texts(settings: Align, shares: _Shares, inputs: Inputs) -> tuple[Batches, list[bytes]]:
    """Texts in batches of like length, and what tells each from another."""
    texts: list[str] = []
    for rows, share in shares:
        every = read_set(rows.dataset, rows.split, rows.text, rows.text)
        texts += [every.texts[row] for row in draw(len(every), share, settings.seed)]

    def batches() -> list[dict[str, Tensor]]:
        if not any((inputs.reference.path / name).is_file() for name in TOKENIZER_FILES):
            raise ConfigError(
                f"names texts, and there is no tokenizer in {inputs.reference.path}",
                where="align.calibration",
                hint="`image:` names a column of images",
            )
        tokenizer = load_tokenizer(inputs.reference.path)
        encoded = encode(tokenizer, texts, settings.max_length)
        order = sorted(range(len(texts)), key=lambda row: (len(encoded["input_ids"][row]), row))
        made = []
        for start in range(0, len(order), TEXT_BATCH):
            chosen = order[start : start + TEXT_BATCH]
            part = {name: [values[row] for row in chosen] for name, values in encoded.items()}
            made.append(dict(tokenizer.pad(part, return_tensors="pt")))
        return made

    return batches, [text.encode("utf-8", "surrogatepass") for text in texts]


def _images(settings: Align, shares: _Shares, inputs: Inputs) -> tuple[Batches, list[bytes]]:
    """Images of all sets mixed, in batches of like size: batch statistics are wrong where a batch is all one task."""
    pictures: list[Any] = []
    for rows, share in shares:
        pick = partial(draw, wanted=share, seed=settings.seed)
        pictures += read_unlabelled(rows.dataset, rows.split, str(rows.image), pick)

    def batches() -> list[dict[str, Tensor]]:
        experts = [expert.checkpoint.path for expert in inputs.experts]
        preprocessors = preprocessing(*_folders(inputs.reference.path, *experts))
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(settings.seed))
        made, first = [], 0
        for part in order.chunk(-(-len(pictures) // IMAGE_BATCH)):
            chosen = [pictures[row] for row in part.tolist()]
            made.append({"pixel_values": preprocessors.batch(chosen, first, "align.calibration")})
            first += len(chosen)
        return made

    return batches, [fingerprint(picture).encode() for picture in pictures]


def _folders(*paths: Path) -> list[Path]:
    return [path if path.is_dir() else path.parent for path in paths]


def _only(rows: EvaluationSet, chosen: Sequence[int]) -> EvaluationSet:
    return replace(
        rows, texts=tuple(rows.texts[row] for row in chosen), labels=tuple(rows.labels[row] for row in chosen)
    )
