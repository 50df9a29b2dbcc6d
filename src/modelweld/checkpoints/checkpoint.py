"""A model directory, opened but not loaded: its tensors are read one at a time, by position."""

from __future__ import annotations

import json
import os
import stat
import threading
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from modelweld.checkpoints.buffers import bytes_of
from modelweld.checkpoints.header import TensorInfo, read_header
from modelweld.checkpoints.pickles import load_pickles
from modelweld.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADERS_ONLY = ".headers-only"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Checkpoint:
    """Weights on disk, with checked headers: `tensors` describes them, `read` and `read_into` read bytes.

    Reading is positional and may be done from several threads at once. Close it, or use it as a context manager.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], descriptors: dict[Path, int]) -> None:
        self.path = path
        self.tensors = tensors
        self._descriptors = descriptors
        self._pickled: dict[str, torch.Tensor] = {}
        self._closing = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, allow_pickle: bool = False) -> Self:
        """The checkpoint in a Hugging Face directory (or one safetensors file).

        >>> from safetensors.torch import save_file
        >>> save_file({"weight": torch.ones(2, 3)}, "model.safetensors")
        >>> with Checkpoint.open("model.safetensors") as checkpoint:
        ...     checkpoint.tensors["weight"].shape, checkpoint.read("weight").sum()
        ((2, 3), tensor(6.))

        Raises CheckpointError, naming file and tensor, for what is missing, truncated, inconsistent or points out
        of the directory, for adapters, and for pickled weights unless `allow_pickle` (they are then read with
        `weights_only=True`, into memory).
        """
        path = Path(path)
        if not path.exists():
            raise CheckpointError("no such model directory", where=str(path), hint="check the path in the recipe")
        files = _weight_files(path, allow_pickle=allow_pickle)
        if any(file.suffix == ".bin" for file in files):
            return cls._of_pickles(path, files)
        descriptors: dict[Path, int] = {}
        try:
            tensors = _read_headers(path, files, descriptors)
        except BaseException:
            for descriptor in descriptors.values():
                os.close(descriptor)
            raise
        return cls(path, tensors, descriptors)

    @classmethod
    def _of_pickles(cls, path: Path, files: list[Path]) -> Self:
        pickled = load_pickles(files)
        tensors = {
            name: TensorInfo(name, tensor.dtype, tuple(tensor.shape), file, 0, tensor.nbytes)
            for name, (file, tensor) in pickled.items()
        }
        checkpoint = cls(path, tensors, {})
        checkpoint._pickled = {name: tensor.contiguous() for name, (_, tensor) in pickled.items()}
        return checkpoint

    def combined_with(self, other: Checkpoint) -> Checkpoint:
        """A checkpoint of this one's tensors and `other`'s, this one's first; it outlives both."""
        descriptors: dict[Path, int] = {}
        try:
            for file, descriptor in {**other._descriptors, **self._descriptors}.items():
                descriptors[file] = os.dup(descriptor)
        except OSError as error:
            for duplicate in descriptors.values():
                os.close(duplicate)
            raise CheckpointError(f"cannot be opened: {error.strerror}", where=str(self.path)) from error
        both = Checkpoint(self.path, {**other.tensors, **self.tensors}, descriptors)
        both._pickled = {**other._pickled, **self._pickled}
        return both

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({info.file for info in self.tensors.values()} | set(self._descriptors))

    @property
    def headers_only(self) -> bool:
        """Whether the files hold headers only, so that values mean nothing."""
        return ((self.path if self.path.is_dir() else self.path.parent) / HEADERS_ONLY).is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands; empty when there is none."""
        directory = self.path if self.path.is_dir() else self.path.parent
        file = directory / "config.json"
        if not file.is_file():
            return {}
        require_inside(file, directory)
        return read_json(file)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, copied out of its file."""
        info = self._info(name)
        flat = torch.empty(info.nbytes, dtype=torch.uint8)
        self.read_into(name, 0, bytes_of(flat))
        return flat.view(info.dtype).reshape(info.shape)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on; the file is read by position, without a seek."""
        info = self._info(name)
        if start + len(buffer) > info.nbytes:
            raise ValueError(f"{name} has {info.nbytes} bytes; {start}+{len(buffer)} were asked for")
        if self._pickled:
            raw = bytes_of(self._pickled[name])
            buffer[:] = raw[start : start + len(buffer)]
            return
        descriptor, done = self._descriptors[info.file], 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], info.offset + start + done)
            except OSError as error:
                raise CheckpointError(f"cannot be read: {error.strerror}", where=self.place(name)) from error
            if count == 0:
                raise CheckpointError("the file became shorter while it was read", where=self.place(name))
            done += count

    def prefetch(self, name: str) -> None:
        """Tell the kernel that this tensor is read next."""
        info = self._info(name)
        if info.file in self._descriptors and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptors[info.file], info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)

    def place(self, name: str) -> str:
        """How an error names this tensor: file and tensor."""
        return f"{self.tensors[name].file}, tensor {name}"

    def close(self) -> None:
        """Close the files. Reading afterwards is an error."""
        with self._closing:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
            self._pickled = {}

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to open the same files: it may work in another directory, or on another host."""
        files = {file: (file.absolute(), _stamp(descriptor)) for file, descriptor in self._descriptors.items()}
        return {"path": self.path, "tensors": self.tensors, "files": files, "pickled": self._pickled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the files again; CheckpointError for one that is not there, or not as it was."""
        descriptors: dict[Path, int] = {}
        self.__init__(state["path"], state["tensors"], descriptors)  # type: ignore[misc]
        self._pickled = state["pickled"]
        try:
            for file, (absolute, stamp) in state["files"].items():
                descriptors[file] = _opened(absolute)
                if _stamp(descriptors[file]) != stamp:
                    raise CheckpointError(
                        "has changed since the merge began", where=str(absolute), hint="run the same command again"
                    )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError as error:
            raise CheckpointError(f"no tensor named {name!r}", where=str(self.path)) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is anything else."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"not a readable JSON file: {error}", where=str(file)) from error
    if not isinstance(document, dict):
        raise CheckpointError("does not hold a JSON object", where=str(file))
    return document


def _opened(file: Path) -> int:
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror}", where=str(file)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("is not a regular file", where=str(file), hint="put the weights there themselves")
    return descriptor


def _stamp(descriptor: int) -> tuple[int, int]:
    state = os.fstat(descriptor)
    return state.st_size, state.st_mtime_ns


def _read_headers(path: Path, files: list[Path], descriptors: dict[Path, int]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        require_inside(file, path if path.is_dir() else path.parent)
        descriptors[file] = _opened(file)
        for name, info in read_header(descriptors[file], file).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is also in {tensors[name].file.name}", where=str(file), hint="remove stale shards"
                )
            tensors[name] = info
    index = path / INDEX
    if index in (path / INDEX, path) and index.is_file() and path.is_dir():
        _agree(index, tensors)
    if not tensors:
        raise CheckpointError("holds no tensors", where=str(path))
    return tensors


def _agree(index: Path, tensors: dict[str, TensorInfo]) -> None:
    weight_map = _weight_map(index)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"the index places tensor {name!r} in {file}, which lacks it", where=str(index))
    unlisted = sorted(set(tensors) - set(weight_map))
    if unlisted:
        raise CheckpointError(
            f"tensor {unlisted[0]!r} of {tensors[unlisted[0]].file.name} is not in the index",
            where=str(index),
            hint="the shards and the index are from different models: fetch them again",
        )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError("has no usable weight_map", where=str(index))
    for file in weight_map.values():
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"points out of the directory: {file!r}", where=str(index), hint="never use such a checkpoint"
            )
    return weight_map


def _weight_files(path: Path, *, allow_pickle: bool) -> list[Path]:
    if path.is_file():
        return [path]
    index, single = path / INDEX, path / SINGLE
    if index.is_file() and single.exists():
        raise CheckpointError(f"holds both {SINGLE} and {INDEX}", where=str(path), hint="remove the one that is stale")
    if index.is_file():
        return [path / file for file in sorted(set(_weight_map(index).values()))]
    if single.exists():
        return [single]
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            "is a PEFT adapter, not a whole model",
            where=str(path),
            hint="name it as an expert of a recipe with a `base:`, or fold it with PEFT's merge_and_unload()",
        )
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise CheckpointError(f"has {len(others)} safetensors files and no {INDEX}", where=str(path))
    return _pickle_files(path, allow_pickle=allow_pickle)


def _pickle_files(path: Path, *, allow_pickle: bool) -> list[Path]:
    found = [path / name for name in PICKLES if (path / name).is_file()]
    if not found:
        raise CheckpointError(
            f"holds no weights ({SINGLE} or {INDEX})", where=str(path), hint="name a Hugging Face model directory"
        )
    if not allow_pickle:
        raise CheckpointError(
            f"holds only pickled weights ({found[0].name}), which can run code when they are read",
            where=str(path),
            hint="use a safetensors version of the model, or set `allow_pickle: true` for this source",
        )
    if found[0].suffix == ".json":
        return [path / file for file in sorted(set(_weight_map(found[0]).values()))]
    return found[:1]


def require_inside(file: Path, directory: Path) -> None:
    """Return only for a file that lies in its directory, or is a link into the store that keeps it by content.

    Raises CheckpointError for any other link: a model may come from anywhere, and what it links to would be published.
    """
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError("is missing, or a link to nothing", where=str(file)) from error
    root = directory.resolve()
    if target.is_relative_to(root):
        return
    # A hub snapshot links into its own repository's blobs; a DVC workspace may link into its cache.
    hub_blobs = root.parent.parent / "blobs"
    if root.parent.name == "snapshots" and target.is_relative_to(hub_blobs):
        return
    if target.parent.parent.name == "md5" and target.parent.parent.parent.name == "files":
        return
    raise CheckpointError(
        f"is a link out of its directory, to {target}", where=str(file), hint="copy the file into the directory"
    )
