"""Evaluation sets: texts and raw labels of one split, from a folder, a file or the Hub, and a digest of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from blake3 import blake3

from modelweld.config.addresses import hub_repository
from modelweld.errors import ConfigError, ExternalError, InputError, SourceError, SourceUnavailable

SUFFIXES = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True)
class EvaluationSet:
    """Rows in their file's order. `class_names` are the set's own names of integer labels, where it declares them."""

    texts: tuple[str, ...]
    labels: tuple[int | str, ...]
    class_names: tuple[str, ...] | None
    where: str

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a model reads: the texts."""
        return self.texts

    def only(self, rows: Sequence[int]) -> Self:
        """The same set with these rows, by number."""
        texts, labels = tuple(self.texts[row] for row in rows), tuple(self.labels[row] for row in rows)
        return replace(self, texts=texts, labels=labels)

    def digest(self) -> str:
        """BLAKE3 of the rows' content: the same for parquet, csv and jsonl, another after any edit or reordering."""
        hasher = blake3()
        for text, label in zip(self.texts, self.labels, strict=True):
            if self.class_names is not None and isinstance(label, int) and 0 <= label < len(self.class_names):
                label = self.class_names[label]
            for part in (text, f"{type(label).__name__}:{label}"):
                raw = part.encode("utf-8", "surrogatepass")
                hasher.update(len(raw).to_bytes(8, "little"))
                hasher.update(raw)
        return str(hasher.hexdigest())


def read_set(source: str, split: str, text: str, label: str) -> EvaluationSet:
    """One split of `source`: a folder of <split>.parquet|csv|jsonl, such a file, or `hf://org/name@revision`.

    InputError when the split, a column or a value is missing; SourceUnavailable when the Hub does not answer.
    """
    path = Path(source)
    if path.is_file():
        rows, where = _read_file(path), str(path)
    elif path.is_dir():
        file = _split_file(path, split)
        rows, where = _read_file(file), str(file)
    elif repository := hub_repository(source):
        rows, where = _read_hub(source, *repository, split), f"{source} [{split}]"
    else:
        raise SourceError(
            "no such folder or file", where=source, hint="a local path, or hf://org/name@revision for a set of the Hub"
        )
    return _checked(rows, text, label, where)


def _split_file(folder: Path, split: str) -> Path:
    candidates = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
    found = [path for path in candidates if path.is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"split {split!r} is there more than once: {names}", where=str(folder), hint="keep one")
    if not found:
        there = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
        raise InputError(
            f"no split {split!r}: neither of {', '.join(path.name for path in candidates)}",
            where=str(folder),
            hint=f"the folder holds {', '.join(there) or 'no data files'}; name the split in params.yaml",
        )
    return found[0]


def _read_file(path: Path) -> Any:
    import pandas as pd
    import pyarrow as pa
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    if path.suffix not in SUFFIXES:
        raise InputError("neither parquet, csv nor jsonl", where=str(path), hint="convert it: `datasets` reads those")
    if not path.stat().st_size:
        raise InputError("no rows: the file is empty", where=str(path), hint="fetch it again")
    readers: dict[str, Callable[..., Any]] = {
        # By default a batch is as large as the first row group, and an empty file's has no rows.
        ".parquet": partial(Dataset.from_parquet, batch_size=8192),
        # Else a text that says "NA", "null" or "None" would be no text at all.
        ".csv": partial(Dataset.from_csv, keep_default_na=False),
        ".jsonl": Dataset.from_json,
    }
    # The library caches by path and time of change; a folder of its own keeps a stale copy from being read.
    with tempfile.TemporaryDirectory(prefix="modelweld-") as scratch, _quiet():
        try:
            return readers[path.suffix](str(path), cache_dir=scratch, keep_in_memory=True)
        except (DatasetGenerationError, pa.ArrowInvalid, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            reason = error.__cause__ or error
            raise InputError(
                f"cannot be read: {reason}", where=str(path), hint="fetch it again, or fix the file"
            ) from error
        except ValueError as error:
            raise InputError(f"no rows: {error}", where=str(path), hint="an evaluation needs rows") from error


def _read_hub(source: str, name: str, revision: str | None, split: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    hint = "copy the set to a local folder, or try again when the Hub can be reached"
    with _quiet():
        try:
            return load_dataset(name, split=split, revision=revision)
        except DatasetNotFoundError as error:
            raise SourceError(
                f"no such set on the Hub: {error}", where=source, hint="a local path, or hf://org/name@revision"
            ) from error
        except (ConnectionError, HfHubHTTPError) as error:
            raise SourceUnavailable(f"the Hub did not answer: {error}", where=source, hint=hint) from error
        except ValueError as error:
            raise InputError(f"{error}", where=source, hint="name a split that the set has") from error
        except OSError as error:
            raise ExternalError(f"the set could not be stored: {error}", where=source, hint=hint) from error


@contextmanager
def _quiet() -> Iterator[None]:
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _checked(rows: Any, text: str, label: str, where: str) -> EvaluationSet:
    from datasets import ClassLabel

    for column in (text, label):
        if column not in rows.column_names:
            raise ConfigError(
                f"no column {column!r} among {', '.join(rows.column_names)}",
                where=where,
                hint="name the columns by `text:` and `label:` of the task in params.yaml",
            )
    if not rows.num_rows:
        raise InputError("the split has no rows", where=where, hint="an evaluation needs rows")
    texts, labels = rows[text][:], rows[label][:]
    for row, value in enumerate(texts):
        if not isinstance(value, str):
            raise InputError(
                f"row {row}: column {text!r} holds {value!r}, not a text", where=where, hint="drop or fix the row"
            )
    for row, value in enumerate(labels):
        if not isinstance(value, int | str):
            raise InputError(
                f"row {row}: column {label!r} holds {value!r}, neither a class number nor a class name",
                where=where,
                hint="drop or fix the row",
            )
    feature = rows.features[label]
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    return EvaluationSet(tuple(texts), tuple(labels), names, where)
