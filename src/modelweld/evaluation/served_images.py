"""Images as a caller of a served model passes them: bytes, base64, arrays, and files of one directory that is open.

A served model runs on another machine than its caller, so a path from outside is an attack until proven otherwise:
files are read only below the directory that MODELWELD_IMAGE_ROOT names on the serving machine, and none by default.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modelweld.errors import InputError
from modelweld.images import Unreadable, decode

ROOT_VARIABLE = "MODELWELD_IMAGE_ROOT"
LARGEST_FILE_BYTES = 64_000_000
SMALLEST_SIDE = 4
_WHERE = "model_input"


def decode_served(values: Sequence[Any]) -> list[Image.Image]:
    """The image in every cell; InputError naming the first row that holds none.

    A cell is encoded bytes, a string of base64 (or a base64 `data:` address), an array (height, width) or
    (height, width, 1 or 3) of whole numbers from 0 to 255, the `datasets` library's {bytes, path}, or {path} alone for
    a file below MODELWELD_IMAGE_ROOT.
    """
    values = _one_column(values)
    images = []
    for row, value in enumerate(values):
        try:
            images.append(_image(value))
        except Unreadable as error:
            raise InputError(
                f"row {row}: {error}",
                where=_WHERE,
                hint="a cell `image` is encoded bytes, base64, an array of unsigned bytes, or {path: …}",
            ) from error
    return images


def _one_column(values: Sequence[Any]) -> Sequence[Any]:
    # MLflow makes one row of {"image": [several strings]}, whose cell is then the list of them.
    if len(values) == 1 and isinstance(values[0], list) and values[0] and isinstance(values[0][0], str):
        return values[0]
    return values


def _image(value: Any) -> Image.Image:
    if isinstance(value, str):
        return decode(_from_base64(value))
    if isinstance(value, os.PathLike) or (isinstance(value, Mapping) and value.get("bytes") is None):
        return decode(_from_file(value if isinstance(value, os.PathLike) else value.get("path")))
    if isinstance(value, Mapping) and isinstance(value["bytes"], str):
        return decode(_from_base64(value["bytes"]))
    image = decode(value)
    if isinstance(value, list | tuple | np.ndarray) and min(image.size) < SMALLEST_SIDE:
        # The rows of one (height, width, 3) image would else pass for grey images that are 3 pixels wide.
        raise Unreadable(f"an array of {image.height} × {image.width} pixels; one image goes into a list of one")
    return image


def _from_base64(text: str) -> bytes:
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise Unreadable("a data: address that is not base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unreadable("a string that is not base64 (a path is given as {path: …})") from error


def _from_file(path: Any) -> bytes:
    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        raise Unreadable(f"a path, and this server opens none: {ROOT_VARIABLE} is not set")
    if not isinstance(path, str | os.PathLike):
        raise Unreadable(f"a path that is {type(path).__name__}")
    allowed = Path(root).resolve()
    # Links and `..` are followed before the comparison. One message covers all refusals, so that a caller cannot find
    # out which files exist elsewhere.
    refused = Unreadable(f"no readable file below {ROOT_VARIABLE}")
    try:
        file = (allowed / path).resolve(strict=True)
        if not file.is_relative_to(allowed) or not file.is_file() or file.stat().st_size > LARGEST_FILE_BYTES:
            raise refused
        return file.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        raise refused from error
