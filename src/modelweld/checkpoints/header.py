"""Reading a safetensors header as hostile input: nothing in it is believed before it was checked against the file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelweld.checkpoints.foreign import SIGNATURE_BYTES, refuse_foreign
from modelweld.errors import CheckpointError

# The format's own ceiling (safetensors' Rust reader refuses more).
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Valid in the format, and not weights that can be added: parts of numbers, scaled by other tensors.
QUANTISED = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor's bytes lie: `nbytes` from `offset` in `file`, counted from the file's first byte."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds; 1 for a scalar."""
        return math.prod(self.shape)


def read_header(descriptor: int, file: Path) -> dict[str, TensorInfo]:
    """Every tensor of an open safetensors file, in the order of its bytes.

    Raises CheckpointError for a truncated file, a header that is absurdly large, is no JSON object or names a tensor
    twice, and for byte ranges that overlap, leave holes, leave the file or disagree with dtype and shape.
    """
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, LENGTH_BYTES, 0)
    if len(prefix) < LENGTH_BYTES:
        raise _bad(file, f"{size} bytes are too few for a safetensors file", truncated=True)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or length > size - LENGTH_BYTES:
        refuse_foreign(os.pread(descriptor, SIGNATURE_BYTES, 0), file)
    if length > MAX_HEADER_BYTES:
        raise _bad(file, f"the header claims {length} bytes, more than the format allows ({MAX_HEADER_BYTES})")
    if length > size - LENGTH_BYTES:
        raise _bad(file, f"the header claims {length} bytes, the file has {size}", truncated=True)
    start = LENGTH_BYTES + length
    entries = _parse(os.pread(descriptor, length, LENGTH_BYTES), file)
    infos = [_entry(name, entry, file, start) for name, entry in entries.items() if name != "__metadata__"]
    # Empty tensors share their offset with a neighbour: the end breaks the tie.
    infos.sort(key=lambda info: (info.offset, info.offset + info.nbytes))
    position = start
    for info in infos:
        if info.offset < position:
            raise _bad(file, f"the bytes of {info.name!r} overlap those of another tensor", tensor=info.name)
        if info.offset > position:
            raise _bad(file, f"{info.offset - position} bytes before {info.name!r} belong to no tensor", info.name)
        position = info.offset + info.nbytes
        if position > size:
            message = f"the bytes of {info.name!r} end at {position}, the file at {size}"
            raise _bad(file, message, tensor=info.name, truncated=True)
    if position != size:
        raise _bad(file, f"{size - position} bytes after the last tensor belong to no tensor")
    return {info.name: info for info in infos}


def _parse(raw: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, entry in pairs:
            if name in entries:
                raise _bad(file, f"the header names {name!r:.80} twice", tensor=name)
            entries[name] = entry
        return entries

    if not raw.startswith(b"{"):
        raise _bad(file, "the header does not begin with '{': not a safetensors file")
    try:
        entries = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"the header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise _bad(file, "the header is not a JSON object")
    return entries


def _entry(name: str, entry: Any, file: Path, start: int) -> TensorInfo:
    if any(0xD800 <= ord(character) <= 0xDFFF for character in name):
        raise _bad(file, f"{name!r:.80} is no name: it holds half of a character")
    if not isinstance(entry, dict):
        raise _bad(file, f"the header's entry for {name!r} is not an object", tensor=name)
    dtype = _dtype(name, entry.get("dtype"), file)
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not all(_is_size(extent) for extent in shape):
        raise _bad(file, f"{name!r} has no sensible shape: {shape!r:.80}", tensor=name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise _bad(file, f"{name!r} has no sensible data_offsets: {offsets!r:.80}", tensor=name)
    begin, end = offsets
    expected = _bytes_of(shape, dtype.itemsize)
    if expected is None:
        message = f"{name!r} takes {end - begin} bytes by its offsets, more than any file has by its dtype and shape"
        raise _bad(file, message, tensor=name)
    if end - begin != expected:
        message = f"{name!r} takes {end - begin} bytes by its offsets, {expected} by its dtype and shape"
        raise _bad(file, message, tensor=name)
    return TensorInfo(name, dtype, tuple(shape), file, start + begin, expected)


def _dtype(name: str, stored: Any, file: Path) -> torch.dtype:
    if isinstance(stored, str) and stored in QUANTISED:
        raise CheckpointError(
            f"{name!r} is stored as {stored}, a quantised format that cannot be merged",
            where=f"{file}, tensor {name}",
            hint="merge the weights from before the quantisation, or dequantise them to bfloat16 first",
        )
    if not isinstance(stored, str) or stored not in DTYPES:
        raise _bad(file, f"{name!r} has the unknown dtype {stored!r:.80}", tensor=name)
    return DTYPES[stored]


def _bytes_of(shape: list[int], itemsize: int) -> int | None:
    """The bytes of a tensor; None for more than a file can have, before the product takes long to compute."""
    if 0 in shape:
        return 0
    total = itemsize
    for extent in shape:
        total *= extent
        if total >= 2**63:
            return None
    return total


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _bad(file: Path, what: str, tensor: str | None = None, *, truncated: bool = False) -> CheckpointError:
    hint = "the file is cut short: fetch it again" if truncated else "fetch the file again, from a source you trust"
    return CheckpointError(what, where=f"{file}, tensor {tensor}" if tensor else str(file), hint=hint)
