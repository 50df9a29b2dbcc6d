"""Digests of weights: BLAKE3 by tensor and for caches, SHA-256 by file where a standard wants it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

from modelweld.checkpoints.checkpoint import Checkpoint
from modelweld.checkpoints.header import LENGTH_BYTES
from modelweld.errors import CheckpointError
from modelweld.formats.manifest import OutputFile

BLOCK = 1 << 20
_FILE_BLOCK = 1 << 23  # large enough for BLAKE3 to share between threads


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_blake3(file: Path) -> str:
    """BLAKE3 of a file, hexadecimal."""
    # Not by mapping the file: its pages would count as this process's memory.
    hasher, buffer = blake3(max_threads=blake3.AUTO), memoryview(bytearray(_FILE_BLOCK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


def tensor_digest(checkpoint: Checkpoint, name: str) -> str:
    """BLAKE3 of a tensor's bytes as they lie in the file: independent of how the model is sharded."""
    hasher, size = blake3(), checkpoint.tensors[name].nbytes
    buffer = memoryview(bytearray(min(BLOCK, size)))
    for start in range(0, size, BLOCK):
        part = buffer[: min(BLOCK, size - start)]
        checkpoint.read_into(name, start, part)
        hasher.update(part)
    return hasher.hexdigest()


def shard_digest(header: bytes, tensors: Iterable[str]) -> str:
    """A safetensors file's identity, from its header's bytes and its tensors' digests in the order of their bytes.

    It covers every byte, and whoever wrote the tensors knows it without reading the file.
    """
    hasher = blake3(header)
    for digest in tensors:
        hasher.update(bytes.fromhex(digest))
    return hasher.hexdigest()


def holds(file: Path, entry: OutputFile) -> bool:
    """Whether a file has the bytes of its entry in a manifest: `tensors_blake3` of a shard, `blake3` of others."""
    if entry.tensors_blake3 is None:
        return file_blake3(file) == entry.blake3
    try:
        with Checkpoint.open(file) as shard, file.open("rb") as stream:
            prefix = stream.read(LENGTH_BYTES)
            header = prefix + stream.read(int.from_bytes(prefix, "little"))
            found = shard_digest(header, (tensor_digest(shard, name) for name in shard.tensors))
    except CheckpointError:
        return False
    return found == entry.tensors_blake3


def content_digest(path: Path | str) -> str:
    """One BLAKE3 for a model directory: over the sorted names and digests of its weights, heads and configs.

    The key of evaluation caches: two directories with the same digest predict alike.
    """
    root = Path(path)
    names = [*root.glob("*.safetensors"), *root.glob("*.safetensors.index.json"), *root.glob("config.json")]
    # The scaling of an adapter's delta stands in its config alone.
    names += [*root.glob("adapter_config.json")]
    names += [*root.glob("heads/*/*.safetensors"), *root.glob("heads/*/config.json")]
    if not any(file.suffix == ".safetensors" for file in names):
        raise CheckpointError("holds no safetensors weights", where=str(root))
    outer = blake3()
    for file in sorted(names):
        outer.update(f"{file.relative_to(root).as_posix()}\0{file_blake3(file)}\n".encode())
    return outer.hexdigest()
