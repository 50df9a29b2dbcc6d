"""Image classification: one class per image, by `…ForImageClassification` models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from PIL import Image
from torch import Tensor

from modelweld.errors import InputError
from modelweld.evaluation.cache import Predictions
from modelweld.evaluation.dataset_spec import DatasetSpec
from modelweld.evaluation.images import (
    ImageSet,
    Preprocessing,
    image_logits,
    preprocessing,
    read_images,
    read_unlabelled,
    top_class,
)
from modelweld.evaluation.kinds.base import Advance, ClassificationKind, Inspection, Pick, Server
from modelweld.evaluation.served_images import decode_served
from modelweld.evaluation.settings import Settings
from modelweld.images import Unreadable, decode, fingerprint

CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Prepared:
    """Images, and how their pixels reach the model."""

    preprocessing: Preprocessing
    images: Sequence[Image.Image]


class ImageClassification(ClassificationKind):
    """Rows of an image and a label."""

    name = "image-classification"
    architecture = "ForImageClassification"
    noun = "images"
    finding_types = {  # noqa: RUF012
        "problem": None, "width": "float64", "height": "float64", "channels": "float64", "uniform": None,
    }  # fmt: skip

    def read(self, spec: DatasetSpec, pick: Pick | None = None) -> ImageSet:
        """Decoded images and raw labels."""
        return read_images(spec.dataset, spec.split, spec.column("image"), spec.column("label"), pick)

    def read_inputs(self, spec: DatasetSpec, pick: Pick | None = None) -> Sequence[Image.Image]:
        """The decoded images."""
        return read_unlabelled(spec.dataset, spec.split, spec.column("image"), pick)

    def fingerprint(self, value: Any) -> bytes:
        """A digest of the pixels."""
        return fingerprint(value).encode()

    def inspect(self, cells: Mapping[str, Any]) -> Inspection:
        """Images are the same when their pixels are, however they were encoded."""
        nothing: dict[str, Any] = dict.fromkeys(self.finding_types)
        if cells["image"] is None:
            return Inspection("", nothing | {"problem": "no image"})
        try:
            image = decode(cells["image"])
        except Unreadable as error:
            return Inspection("", nothing | {"problem": str(error)})
        bands = image.split()
        return Inspection(
            fingerprint(image),
            {
                "problem": None,
                "width": image.width,
                "height": image.height,
                "channels": len(bands),
                "uniform": all(len(set(band.getextrema())) == 1 for band in bands),
            },
        )

    def inputs_digest(self, folders: Sequence[Path]) -> str:
        """That of the image processor's settings."""
        return preprocessing(*folders).digest

    def prepare(self, inputs: Sequence[Any], folders: Sequence[Path], settings: Settings) -> Prepared:
        """The images beside the processor; pixels are made batch by batch, to bound memory."""
        return Prepared(preprocessing(*folders), inputs)

    def predict(self, model: Any, prepared: Any, settings: Settings, advance: Advance, where: str) -> Predictions:
        """The class of every image and its probability."""
        return top_class(image_logits(model, prepared.preprocessing, prepared.images, settings, advance, where))

    def calibration_batches(
        self, inputs: Sequence[Any], folders: Sequence[Path], max_length: int, seed: int
    ) -> list[dict[str, Tensor]]:
        """Images of all sets mixed, in batches of like size: batch statistics are wrong where a batch is one task."""
        processor = preprocessing(*folders)
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        batches, first = [], 0
        for part in order.chunk(-(-len(inputs) // CALIBRATION_BATCH)):
            chosen = [inputs[row] for row in part.tolist()]
            batches.append({"pixel_values": processor.batch(chosen, first, "align.calibration")})
            first += len(chosen)
        return batches

    def served_rows(self, model_input: Any) -> list[Any]:
        """A frame or a mapping with a column `image`, or a list of images: see `decode_served`."""
        if isinstance(model_input, Mapping):
            model_input = pandas.DataFrame({name: list(values) for name, values in model_input.items()})
        if isinstance(model_input, pandas.DataFrame):
            if "image" not in model_input.columns:
                columns = ", ".join(str(column) for column in model_input.columns)
                raise InputError(
                    f"no column 'image' among: {columns}", where="model_input", hint="rename it to 'image'"
                )
            model_input = model_input["image"]
        return decode_served(list(model_input))

    def server(self, model: Any, folder: Path, max_length: int, device: str) -> Server:
        """Labels and probabilities; pixels are made as the served directory says."""
        processor, names = preprocessing(folder), model.config.id2label
        settings = Settings(max_length, batch_tokens=1, device=device)

        def answer(images: Sequence[Any]) -> pandas.DataFrame:
            if not images:
                return pandas.DataFrame({"label": [], "confidence": []})
            logits = image_logits(model, processor, images, settings, lambda _: None, "model_input")
            probabilities, classes = torch.from_numpy(logits).softmax(dim=-1).max(dim=-1)
            labels = [str(names[number]) for number in classes.tolist()]
            return pandas.DataFrame({"label": labels, "confidence": np.asarray(probabilities.double())})

        return answer


KIND = ImageClassification()
