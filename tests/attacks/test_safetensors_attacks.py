"""Hostile model directories: each attack is written to disk and must be refused by name, before a weight is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modelweld.checkpoints import Checkpoint
from modelweld.errors import CheckpointError


def raw(directory: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    size = struct.pack("<Q", len(header) if length is None else length)
    (directory / "model.safetensors").write_bytes(size + header + data)


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty file": (lambda d: (d / "model.safetensors").write_bytes(b"") and None, "too few"),
    "header larger than the format allows": (lambda d: raw(d, b"{}", length=2**62), "more than the format allows"),
    "header larger than the file": (lambda d: raw(d, b"{}", length=5000), "cut short"),
    "header that is not JSON": (lambda d: raw(d, b"{nonsense}"), "not valid JSON"),
    "header that is a list": (lambda d: raw(d, b"[1, 2]"), "does not begin with"),
    "header nested without end": (lambda d: raw(d, b'{"a":' * 100_000), "not valid JSON"),
    "number without end": (lambda d: raw(d, b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "not valid JSON"),
    "name given twice": (
        lambda d: raw(d, b'{"a":' + json.dumps(entry(0, 4, [1])).encode() + b',"a":{"dtype":"F32"}}', bytes(4)),
        "names 'a' twice",
    ),
    "key given twice inside": (lambda d: raw(d, b'{"a":{"dtype":"F32","dtype":"F64"}}'), "twice"),
    "overlapping tensors": (lambda d: raw(d, header(a=entry(0, 8, [2]), b=entry(4, 12, [2])), bytes(12)), "overlap"),
    "a hole between tensors": (
        lambda d: raw(d, header(a=entry(0, 4, [1]), b=entry(8, 12, [1])), bytes(12)),
        "no tensor",
    ),
    "bytes behind the last tensor": (lambda d: raw(d, header(a=entry(0, 4, [1])), bytes(400)), "belong to no tensor"),
    "offsets past the end": (lambda d: raw(d, header(a=entry(0, 400, [100])), bytes(4)), "cut short"),
    "offsets backwards": (lambda d: raw(d, header(a=entry(8, 4, [1])), bytes(8)), "by its offsets"),
    "offsets that disagree with the shape": (lambda d: raw(d, header(a=entry(0, 4, [7])), bytes(4)), "by its offsets"),
    "negative shape": (lambda d: raw(d, header(a=entry(0, 4, [-1])), bytes(4)), "no sensible shape"),
    "boolean shape": (lambda d: raw(d, header(a=entry(0, 4, [True])), bytes(4)), "no sensible shape"),
    "shape whose product overflows": (lambda d: raw(d, header(a=entry(0, 4, [2**62, 2**62])), bytes(4)), "by its"),
    "unknown dtype": (lambda d: raw(d, header(a=entry(0, 4, [1], "PICKLE")), bytes(4)), "unknown dtype"),
    "dtype that is no string": (lambda d: raw(d, header(a={"dtype": 7}), bytes(4)), "unknown dtype"),
    "dtype that is a list": (lambda d: raw(d, header(a={"dtype": []}), bytes(4)), "unknown dtype"),
    "shape of 10,000 huge extents": (
        lambda d: raw(d, header(a=entry(0, 4, [2**62] * 10_000)), bytes(4)),
        "more than any file has",
    ),
    "half of a character in a name": (lambda d: raw(d, header(**{"\ud800": entry(0, 4, [1])}), bytes(4)), "is no name"),
    "entry that is no object": (lambda d: raw(d, header(a=[1, 2]), bytes(4)), "not an object"),
    "no tensors at all": (lambda d: raw(d, b"{}"), "holds no tensors"),
}


def _pickle(directory: Path) -> None:
    torch.save({"a": torch.ones(4, 4)}, directory / "model.safetensors")


def _old_pickle(directory: Path) -> None:
    torch.save({"a": torch.ones(4)}, directory / "model.safetensors", _use_new_zipfile_serialization=False)


OTHER_FILES: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98304\n", "Git LFS pointer"),
    "web page": (b"\n<!DOCTYPE html><html>" + b"x" * 400, "web page"),
    "web page without a doctype": (b"\xef\xbb\xbf<HTML><body>" + b"x" * 400, "web page"),
    "message of a server": (b'{"error": "Repository not found"}', "JSON text"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5 file"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\xff" + bytes(100), "compressed by gzip"),
    "torch.save": (_pickle, "is a pickle in a zip archive, as torch.save"),
    "old torch.save": (_old_pickle, "pickle, which can run code"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_another_kind_of_file_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    content, words = OTHER_FILES[kind]
    if isinstance(content, bytes):
        (tmp_path / "model.safetensors").write_bytes(content)
    else:
        content(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.hint
    assert "header claims" not in caught.value.what


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E5M2FNUZ"])
def test_a_quantised_dtype_is_named_as_such(tmp_path: Path, dtype: str) -> None:
    raw(tmp_path, header(a=entry(0, 4, [4], dtype)), bytes(4))
    with pytest.raises(CheckpointError, match=f"stored as {dtype}, a quantised format") as caught:
        Checkpoint.open(tmp_path)
    assert "fetch the file again" not in str(caught.value)


# Comparing each name with every other would take many minutes for so many.
@pytest.mark.timeout(120)
def test_a_name_given_twice_among_many_is_found(tmp_path: Path) -> None:
    names = [f'"n{number}":{json.dumps(entry(0, 0, [0]))}' for number in range(200_000)]
    raw(tmp_path, ("{" + ",".join([*names, names[-1]]) + "}").encode())
    with pytest.raises(CheckpointError, match="names 'n199999' twice"):
        Checkpoint.open(tmp_path)


def test_a_named_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path)
    os.mkfifo(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_lying_header_is_refused(tmp_path: Path, attack: str) -> None:
    make, words = ATTACKS[attack]
    make(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    save_file({"a": torch.randn(4, 4), "b": torch.randn(3)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            Checkpoint.open(tmp_path)


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    secret, model = tmp_path / "secret.safetensors", tmp_path / "model"
    save_file({"a": torch.ones(2)}, secret)
    model.mkdir()
    (model / "model.safetensors").symlink_to(secret)
    with pytest.raises(CheckpointError, match="link out of its directory"):
        Checkpoint.open(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError):
        Checkpoint.open(model)


def test_a_hub_snapshot_may_link_into_its_own_blobs(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "deadbeef")
    (snapshot / "model.safetensors").symlink_to(blobs / "deadbeef")
    with Checkpoint.open(snapshot) as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.ones(2))


@pytest.mark.parametrize("file", ["../out.safetensors", "/etc/passwd", "..", "sub/x.safetensors", ""])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "out.safetensors")
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="out of the directory"):
        Checkpoint.open(model)


def test_shards_and_index_of_different_models_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "extra": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")

    def index(weight_map: dict[str, str]) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index({"a": one, "b": two})
    with pytest.raises(CheckpointError, match=r"'extra'.*not in the index"):
        Checkpoint.open(tmp_path)
    index({"a": one, "extra": one, "b": two, "ghost": two})
    with pytest.raises(CheckpointError, match=r"'ghost'.*lacks it"):
        Checkpoint.open(tmp_path)
    save_file({"b": torch.ones(2), "a": torch.ones(2)}, tmp_path / two)
    index({"a": one, "extra": one, "b": two})
    with pytest.raises(CheckpointError, match="'a' is also in"):
        Checkpoint.open(tmp_path)
    (tmp_path / two).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint.open(tmp_path)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    touched = tmp_path / "owned"
    torch.save({"a": torch.ones(1), "b": Payload(touched)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="plain weights"):
        Checkpoint.open(tmp_path, allow_pickle=True)
    assert not touched.exists()


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        with (tmp_path / "model.safetensors").open("r+b") as stream:
            stream.truncate(500)
        with pytest.raises(CheckpointError, match="became shorter"):
            checkpoint.read("a")
