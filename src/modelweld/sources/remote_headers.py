"""What can be known of a model before it is fetched: its small files, and of its weights the headers.

read_remote_headers(source, files, Path("seen"))
Checkpoint.open("seen")  # every tensor's name, dtype and shape; its values are not there
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from modelweld.checkpoints.checkpoint import HEADERS_ONLY, read_json
from modelweld.checkpoints.header import LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo, read_header
from modelweld.errors import CheckpointError
from modelweld.sources.refusals import safe_name
from modelweld.sources.source import Listed, Source

_FIRST_BYTES = 1 << 16
_SMALL_BYTES = 1 << 20
_INDEX = ".safetensors.index.json"
_MARK_BYTES = 8


def read_remote_headers(source: Source, files: Mapping[str, Listed], folder: Path) -> int:
    """Make, in `folder`, the model's directory with weight files that are headers only; returns the bytes read.

    Behind its header such a file is a hole of the size that the weights have. Small JSON files are read whole, and
    tokenizers and the like left out. Raises what reading the upstream raises; a header that lies is left as it is, for
    whoever opens it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    read, weights = 0, []
    for name, listed in sorted(files.items()):
        path = folder / safe_name(name, source.where)
        if "/" in name:
            continue
        if name.endswith(".safetensors"):
            weights.append(path)
            read += _header(source, name, listed, path)
        elif name.endswith(_INDEX) or (name.endswith(".json") and listed.size_bytes <= _SMALL_BYTES):
            whole = source.beginning(name, listed, listed.size_bytes)
            path.write_bytes(whole)
            read += len(whole)
    (folder / HEADERS_ONLY).touch()
    _mark(folder, weights)
    return read


def _header(source: Source, name: str, listed: Listed, path: Path) -> int:
    """Write the header of one weight file; how many bytes were read."""
    found = source.beginning(name, listed, _FIRST_BYTES)
    wanted = LENGTH_BYTES + int.from_bytes(found[:LENGTH_BYTES], "little")
    # A length that no header has is not asked for: the checks that refuse it need no more than it.
    if len(found) < wanted <= min(listed.size_bytes, MAX_HEADER_BYTES + LENGTH_BYTES):
        found = source.beginning(name, listed, wanted)
    with path.open("wb") as stream:
        stream.write(found[:wanted])
        stream.truncate(listed.size_bytes)
    return len(found)


def _mark(folder: Path, weights: list[Path]) -> None:
    """Make tensors differ where nothing else says that they are one: zeros would be taken for tied weights."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for path in weights:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            for info in read_header(descriptor, path).values():
                if info.nbytes >= _MARK_BYTES:
                    os.pwrite(descriptor, _mark_of(info, config), info.offset)
        except CheckpointError:
            continue
        finally:
            os.close(descriptor)


def _mark_of(info: TensorInfo, config: Mapping[str, object]) -> bytes:
    table = len(info.shape) == 2 and info.shape[0] == config.get("vocab_size")
    name = "table" if table and config.get("tie_word_embeddings") else info.name
    return bytes(blake3(f"{name} {info.shape}".encode()).digest(length=_MARK_BYTES))
