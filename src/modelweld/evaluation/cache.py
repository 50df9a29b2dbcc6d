"""Predictions cached by content: the key covers everything they depend on, and each entry verifies itself."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3
from numpy.typing import NDArray

_log = logging.getLogger(__name__)
_SEAL = b"modelweld.seal"
CONFIDENCE_DIGITS = 4  # float32 noise between batch shapes stays below


@dataclass(frozen=True)
class Predictions:
    """The class of each row (int64) and its probability (float32), in the set's order."""

    classes: NDArray[np.int64]
    confidence: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.classes)


def content_key(parts: Mapping[str, Any]) -> str:
    """BLAKE3 of a JSON document that holds all that predictions depend on."""
    return str(blake3(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest())


@dataclass(frozen=True)
class PredictionCache:
    """A folder of <key>.parquet. `get` returns None for an entry that is damaged, foreign or renamed."""

    folder: Path

    def get(self, key: str, rows: int) -> Predictions | None:
        """The entry of `key`, or None when there is none, or none that verifies."""
        path = self.folder / f"{key}.parquet"
        try:
            table = pq.read_table(path, columns=["class", "confidence"])
            found = Predictions(
                table["class"].to_numpy().astype(np.int64), table["confidence"].to_numpy().astype(np.float32)
            )
            seal = (table.schema.metadata or {}).get(_SEAL, b"").decode("ascii", "replace")
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, ValueError) as error:
            _log.warning("predictions in %s cannot be read and are made again: %s", path, error)
            return None
        if len(found) != rows or seal != _seal(key, found):
            _log.warning("predictions in %s do not match their seal and are made again", path)
            return None
        return found

    def put(self, key: str, predictions: Predictions) -> None:
        """Store an entry by rename, never half written. A cache that cannot be written only costs time."""
        schema = pa.schema(
            [("class", pa.int64()), ("confidence", pa.float32())],
            metadata={_SEAL: _seal(key, predictions).encode("ascii")},
        )
        table = pa.table([pa.array(predictions.classes), pa.array(predictions.confidence)], schema=schema)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".writing-") as scratch:
                written = Path(scratch) / "entry.parquet"
                pq.write_table(table, written, compression="zstd")
                os.replace(written, self.folder / f"{key}.parquet")
        except OSError as error:
            _log.warning("predictions are not cached in %s: %s", self.folder, error)


def _seal(key: str, predictions: Predictions) -> str:
    hasher = blake3(key.encode())
    hasher.update(np.ascontiguousarray(predictions.classes, dtype="<i8").tobytes())
    hasher.update(np.ascontiguousarray(predictions.confidence, dtype="<f4").tobytes())
    return str(hasher.hexdigest())
