"""Images through a model: rows of images, the preprocessing that a model states, and its logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from blake3 import blake3
from numpy.typing import NDArray
from PIL import Image

from modelweld.checkpoints.checkpoint import read_json
from modelweld.errors import CheckpointError, ConfigError, ExternalError, InputError, SourceError
from modelweld.evaluation.cache import CONFIDENCE_DIGITS, Predictions
from modelweld.evaluation.settings import Settings
from modelweld.images import Unreadable, decode, fingerprint

PROCESSOR = "preprocessor_config.json"
BATCH = 64
# What a model without a processor of its own gets: transformers' own defaults for its ViT.
DEFAULT = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "mean": 0.5, "spread": 0.5}


@dataclass(frozen=True)
class ImageSet:
    """Rows in their file's order. `class_names` are the set's own names of integer labels, where it declares them."""

    images: tuple[Image.Image, ...]
    labels: tuple[int | str, ...]
    class_names: tuple[str, ...] | None
    where: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def inputs(self) -> tuple[Image.Image, ...]:
        """What a model reads: the images."""
        return self.images

    @cached_property
    def _digest(self) -> str:
        hasher = blake3()
        for image, label in zip(self.images, self.labels, strict=True):
            if self.class_names is not None and isinstance(label, int) and 0 <= label < len(self.class_names):
                label = self.class_names[label]
            hasher.update(f"{fingerprint(image)}:{type(label).__name__}:{label}\n".encode())
        return str(hasher.hexdigest())

    def digest(self) -> str:
        """BLAKE3 of the rows' pixels and labels: another after any edit or reordering."""
        return self._digest


Pick = Callable[[int], Sequence[int]]


def read_images(source: str, split: str, image: str, label: str, pick: Pick | None = None) -> ImageSet:
    """One split of `source`, a folder of <split>.parquet or such a file; of its rows those that `pick` names.

    `pick` is called with the number of rows. InputError when the split, a column or a value is missing, or when an
    image cannot be decoded, naming its row.
    """
    path, table = _table(source, split, (image, label))
    rows = pick(table.num_rows) if pick else range(table.num_rows)
    column = table.column(label)
    labels = [column[row].as_py() for row in rows]
    for row, value in zip(rows, labels, strict=True):
        if not isinstance(value, int | str):
            raise InputError(
                f"row {row}: column {label!r} holds {value!r}, neither a class number nor a class name",
                where=str(path),
                hint="drop or fix the row",
            )
    images = _decoded(table, image, rows, path)
    return ImageSet(images, tuple(labels), _class_names(table.schema, label), str(path))


def read_unlabelled(source: str, split: str, image: str, pick: Pick | None = None) -> tuple[Image.Image, ...]:
    """The images of the rows that `pick` names, as for `read_images`; no label is asked for."""
    path, table = _table(source, split, (image,))
    return _decoded(table, image, pick(table.num_rows) if pick else range(table.num_rows), path)


def _table(source: str, split: str, columns: Sequence[str]) -> tuple[Path, pyarrow.Table]:
    path = Path(source)
    if path.is_dir():
        path = path / f"{split}.parquet"
    elif not path.is_file():
        raise SourceError("no such folder or file", where=source, hint="a folder with <split>.parquet files")
    if path.suffix != ".parquet" or not path.is_file():
        raise InputError("no parquet file", where=str(path), hint="image sets are kept as <split>.parquet")
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot be read: {reason}", where=str(path), hint="fetch it again") from error
    for column in columns:
        if column not in table.column_names:
            raise ConfigError(
                f"no column {column!r} among {', '.join(table.column_names)}",
                where=str(path),
                hint="name the columns by `image:` and `label:` of the task in params.yaml",
            )
    if not table.num_rows:
        raise InputError("the split has no rows", where=str(path), hint="an evaluation needs rows")
    return path, table


def _decoded(table: pyarrow.Table, column: str, rows: Sequence[int], path: Path) -> tuple[Image.Image, ...]:
    values, images = table.column(column), []
    for row in rows:
        try:
            images.append(decode(values[row].as_py()))
        except Unreadable as error:
            raise InputError(f"row {row}: {error}", where=str(path), hint="drop or fix the row") from error
    return tuple(images)


def _class_names(schema: pyarrow.Schema, column: str) -> tuple[str, ...] | None:
    """Names that the `datasets` library kept in the file for an integer column."""
    try:
        kept = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, kept)) if isinstance(kept, list) else None


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of one model: `processor` turns images into `pixel_values`; `mode` is the channels it takes."""

    processor: Any
    mode: str
    digest: str

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(rows, channels, height, width), as the model was trained on; every image in the model's channels."""
        converted = [image if image.mode == self.mode else image.convert(self.mode) for image in images]
        return torch.as_tensor(self.processor(converted, return_tensors="pt")["pixel_values"])

    def batch(self, images: Sequence[Image.Image], first: int, where: str) -> torch.Tensor:
        """The same for rows from number `first` on; InputError naming them when the processor leaves several sizes."""
        try:
            return self.pixels(images)
        except ValueError as error:
            raise InputError(
                f"images {first} to {first + len(images) - 1} cannot be stacked: {str(error).splitlines()[0]}",
                where=where,
                hint=f"let the model's {PROCESSOR} resize, or give images of one size",
            ) from error


def preprocessing(*folders: Path) -> Preprocessing:
    """The preprocessing that the first of these model folders states in its preprocessor_config.json.

    Without one anywhere: resized to the first folder's `image_size` where its config has one, scaled to [0, 1], then
    normalised by mean 0.5 and deviation 0.5. CheckpointError when the model takes neither one channel nor three, or
    its processor cannot be built.
    """
    from transformers import ViTImageProcessorPil

    config = read_json(folders[0] / "config.json")
    channels = config.get("num_channels", 3)
    if channels not in (1, 3):
        raise CheckpointError(
            f"takes {channels} channels", where=str(folders[0] / "config.json"), hint="grey and RGB images are read"
        )
    mode = "L" if channels == 1 else "RGB"
    for folder in folders:
        if (folder / PROCESSOR).is_file():
            return Preprocessing(_stated(folder), mode, _digest((folder / PROCESSOR).read_bytes(), mode))
    size = config.get("image_size")
    options: dict[str, Any] = {
        "do_resize": size is not None,
        "do_rescale": DEFAULT["do_rescale"],
        "rescale_factor": DEFAULT["rescale_factor"],
        "do_normalize": DEFAULT["do_normalize"],
        "image_mean": [DEFAULT["mean"]] * channels,
        "image_std": [DEFAULT["spread"]] * channels,
    }
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        options["size"] = {"height": height, "width": width}
    return Preprocessing(
        ViTImageProcessorPil(**options), mode, _digest(json.dumps(options, sort_keys=True).encode(), mode)
    )


def _stated(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        # Pillow's arithmetic everywhere: torchvision resizes otherwise, and is not always there.
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"its processor cannot be built: {str(error).splitlines()[0]}",
            where=str(folder / PROCESSOR),
            hint="save the model's image processor again with this version of transformers",
        ) from error


def _digest(text: bytes, mode: str) -> str:
    return str(blake3(mode.encode() + b":" + text).hexdigest())


def image_logits(
    model: Any,
    processor: Preprocessing,
    images: Sequence[Image.Image],
    settings: Settings,
    advance: Callable[[int], None],
    where: str,
) -> NDArray[np.float32]:
    """Logits (rows, classes) in the rows' order, weights in float32.

    InputError when the processor leaves images of different sizes, CheckpointError when the model gives NaN;
    ExternalError when the device runs out of memory.
    """
    model = model.to(device=settings.device, dtype=torch.float32).eval()
    collected = []
    with torch.inference_mode(), settings.products():
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            pixels = processor.batch(part, start, where)
            try:
                collected.append(model(pixel_values=pixels.to(settings.device)).logits)
            except torch.OutOfMemoryError as error:
                raise ExternalError(
                    f"out of memory on {settings.device} with {len(part)} images",
                    where=where,
                    hint="evaluate on another device: MODELWELD_DEVICE=cpu",
                ) from error
            advance(len(part))
    every = torch.cat(collected).float().cpu()
    if not bool(torch.isfinite(every).all()):
        raise CheckpointError(
            "the model's outputs are not finite", where=where, hint="check its weights: `modelweld stage validate`"
        )
    return np.asarray(every.numpy())


def top_class(logits: NDArray[np.float32]) -> Predictions:
    """The class of every row and its probability."""
    probabilities, classes = torch.from_numpy(logits).softmax(dim=-1).max(dim=-1)
    confidence = np.round(probabilities.double().numpy(), CONFIDENCE_DIGITS).astype(np.float32)
    return Predictions(classes.numpy(), confidence)


def joint(logits: Sequence[NDArray[np.float32]]) -> Predictions:
    """Predictions over the classes of all heads: their logits in one row, and classes numbered across the heads.

    The heads were trained apart, so nothing made their logits comparable: this asks more than each task alone.
    """
    if len({len(one) for one in logits}) != 1:
        raise InputError("the heads answered different rows", hint="predict the same rows with every head")
    return top_class(np.concatenate(list(logits), axis=1))
