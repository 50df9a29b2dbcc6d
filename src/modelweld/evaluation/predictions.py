"""predictions/<task>.parquet: a row number, then the columns of the task's kind; equal input gives equal bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_predictions(path: Path, columns: Mapping[str, pa.Array]) -> None:
    """Write the file by rename: DVC may have linked the old one into its cache, which must not change."""
    rows = len(next(iter(columns.values())))
    numbers = pa.array(np.arange(rows, dtype=np.int64))
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{path.name}.writing")
    pq.write_table(
        pa.table({"row": numbers, **columns}),
        writing,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        row_group_size=65_536,
    )
    os.replace(writing, path)
