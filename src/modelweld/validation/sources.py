"""Directories of models/ and datasets/ against what was pinned: unexpected ones, and files that changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas

from modelweld.formats.lock import Pinned
from modelweld.validation.tables import Table

__all__ = ["changed_files", "source_table", "unexpected"]

SHOWN = 5
# What a fetch of pickled weights puts in their place.
REWRITTEN = frozenset({"model.safetensors", "adapter_model.safetensors"})
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin.index.json")


def unexpected(folder: Path, known: Iterable[str]) -> list[str]:
    """Names in models/ or datasets/ that no source put there, sorted; dot files are DVC's and git's."""
    expected = set(known)
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name not in expected and path.name[0] != ".")


def changed_files(directory: Path, pin: Pinned, verify: bool = True) -> str | None:
    """What in a directory is not as it was pinned, in words; None when everything is.

    Names and sizes always; digests too when `verify` is set, which reads every byte once.
    """
    there = {
        path.relative_to(directory).as_posix(): path
        for path in directory.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }
    wanted = dict(pin.files)
    if pin.allow_pickle and any(name.endswith(PICKLED) and name not in there for name in wanted):
        wanted = {name: known for name, known in wanted.items() if not name.endswith(PICKLED) or name in there}
        there = {name: path for name, path in there.items() if name in wanted or name not in REWRITTEN}
    changes = dict.fromkeys(wanted.keys() - there.keys(), "is missing")
    changes |= dict.fromkeys(there.keys() - wanted.keys(), "was not pinned")
    same_size = []
    for name in sorted(wanted.keys() & there.keys()):
        size = there[name].stat().st_size
        if size != wanted[name].size_bytes:
            changes[name] = f"has {size} bytes, pinned were {wanted[name].size_bytes}"
        else:
            same_size.append(name)
    if verify:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            digests = pool.map(_sha256, [there[name] for name in same_size])
            changes |= {
                name: "has other bytes than were pinned"
                for name, digest in zip(same_size, digests, strict=True)
                if digest != wanted[name].sha256
            }
    if not changes:
        return None
    listed = "; ".join(f"{name} {changes[name]}" for name in sorted(changes)[:SHOWN])
    return f"{listed}; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else listed


def source_table(
    subject: str, path: str, *, pinned: bool, licence: str | None, changed: str | None, problem: str | None
) -> Table:
    """One directory as the one row of its table; `problem` says why it could not be read, if it could not."""
    row = {"path": path, "pinned": pinned, "licence": licence, "changed_files": changed, "problem": problem}
    return Table("sources", subject, path, pandas.DataFrame([row]), key="path")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
