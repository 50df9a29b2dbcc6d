"""Running sums over a tensor, alone and compared with the base's, from chunks of about half a megabyte."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from modelweld.checkpoints import Checkpoint, TensorInfo
from modelweld.checkpoints.buffers import bytes_of

CHUNK = 1 << 16
SKETCH_COLUMNS = 64
SKETCH_LIMIT = 1 << 26
RANK_TOLERANCE = 1e-2


class Measure:
    """Running sums over one tensor."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info
        self.finite = 0
        self.squares = 0.0

    def add(self, values: Tensor) -> float:
        """Take a flat float64 chunk into the sums; the sum of its squares."""
        squares = float(torch.dot(values, values))
        # The sum of squares is finite only when every element is, which nearly always spares the count.
        finite = values.numel() if math.isfinite(squares) else int(torch.isfinite(values).sum())
        self.finite += finite
        self.squares += squares
        return squares

    def row(self, role: str, base: TensorInfo | None) -> dict[str, object]:
        """The tensor's row of the inventory, in a role and beside the base's tensor."""
        count, real = self.info.elements, is_real(self.info)
        return {
            "name": self.info.name,
            "role": role,
            "shape": shape_of(self.info),
            "base_shape": base and shape_of(base),
            "dimensions": len(self.info.shape),
            "dtype": dtype_of(self.info),
            "base_dtype": base and dtype_of(base),
            "dtype_class": dtype_class(self.info),
            "base_dtype_class": base and dtype_class(base),
            "finite_share": (self.finite / count if count else 1.0) if real else math.nan,
            "norm": math.sqrt(self.squares) if real else math.nan,
            "delta_norm": math.nan,
            "relative_delta": math.nan,
            "matrix_delta": math.nan,
            "changed_share": math.nan,
            "delta_rank": math.nan,
        }


class Delta(Measure):
    """Running sums over an expert's tensor and its difference from the base's."""

    def __init__(self, info: TensorInfo) -> None:
        super().__init__(info)
        self.delta_squares = 0.0
        self.base_squares = 0.0
        self.changed = 0
        self.sketched = len(info.shape) == 2 and 0 < info.elements <= SKETCH_LIMIT
        self.sketch: list[Tensor] = []
        self.rank = math.nan
        self.digest = blake3()

    def add_beside(self, mine: Tensor, reference: Tensor, exact: Tensor, squares: float) -> None:
        """Take a chunk and the base's: as stored (`reference`), in float64 (`exact`), and the sum of its squares."""
        values = mine.double()
        self.digest.update(bytes_of(values))
        self.add(values)
        delta = values - exact
        self.delta_squares += float(torch.dot(delta, delta))
        self.base_squares += squares
        rounded = exact if mine.dtype == reference.dtype else reference.to(mine.dtype).double()
        self.changed += int(torch.count_nonzero(values != rounded))
        if self.sketched:
            columns = self.info.shape[1]
            self.sketch.append(delta.reshape(-1, columns).float() @ _directions(columns))  # (rows, SKETCH_COLUMNS)

    @property
    def relative(self) -> float:
        """The delta's norm over the base's; NaN beside zeros."""
        return math.sqrt(self.delta_squares / self.base_squares) if self.base_squares > 0 else math.nan

    def finish(self) -> None:
        """Estimate the rank: how many singular values of the sketched delta exceed a hundredth of the largest."""
        if not self.sketch or not math.isfinite(self.delta_squares):
            return
        sketch = torch.cat(self.sketch).double()  # (n, SKETCH_COLUMNS)
        self.sketch.clear()
        squares = torch.linalg.eigvalsh(sketch.T @ sketch)  # singular values squared, ascending
        largest = float(squares[-1])
        above = int((squares > largest * RANK_TOLERANCE**2).sum()) if largest > 0 else 0
        self.rank = float(min(above, *self.info.shape))

    def row(self, role: str, base: TensorInfo | None) -> dict[str, object]:
        """As of a tensor alone, with what it says beside the base's."""
        changed = self.changed / self.info.elements if self.info.elements else 0.0
        return super().row(role, base) | {
            "delta_norm": math.sqrt(self.delta_squares),
            "relative_delta": self.relative,
            "matrix_delta": self.relative if len(self.info.shape) >= 2 else math.nan,
            "changed_share": changed,
            "delta_rank": self.rank,
        }


def measured(checkpoint: Checkpoint, info: TensorInfo) -> Measure:
    """A tensor that has nothing beside it, read to its end."""
    measure = Measure(info)
    if is_real(info):
        for _, values in chunks(checkpoint, info):
            measure.add(values.double())
    return measure


def chunks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[tuple[int, Tensor]]:
    """The tensor's elements in order, flat, with the index of the first; matrices in whole rows."""
    if not is_real(info):
        return
    columns = info.shape[1] if len(info.shape) == 2 else 1
    step = max(1, CHUNK // max(1, columns)) * columns
    for start in range(0, info.elements, step or 1):
        yield start, read_chunk(checkpoint, info, start, min(step, info.elements - start))


def read_chunk(checkpoint: Checkpoint, info: TensorInfo, start: int, count: int) -> Tensor:
    """`count` elements from `start`, as stored."""
    raw = torch.empty(count * info.dtype.itemsize, dtype=torch.uint8)
    checkpoint.read_into(info.name, start * info.dtype.itemsize, bytes_of(raw))
    return raw.view(info.dtype)


@functools.lru_cache(maxsize=8)
def _directions(columns: int) -> Tensor:
    """The fixed random directions (columns, SKETCH_COLUMNS) that a matrix of so many columns is looked at from."""
    return torch.from_numpy(np.random.default_rng(columns).standard_normal((columns, SKETCH_COLUMNS), dtype=np.float32))


def is_real(info: TensorInfo) -> bool:
    """Whether its values can be summed up: everything but complex numbers."""
    return not info.dtype.is_complex


def shape_of(info: TensorInfo) -> str:
    """`768×768`, for people."""
    return "×".join(map(str, info.shape)) or "scalar"


def dtype_of(info: TensorInfo) -> str:
    """`bfloat16`, for people."""
    return str(info.dtype).removeprefix("torch.")


def dtype_class(info: TensorInfo) -> str:
    """What kind of number it is stored as: float, float8, integer, bool or complex."""
    if info.dtype.is_complex:
        return "complex"
    if info.dtype.is_floating_point:
        return "float" if info.dtype.itemsize > 1 else "float8"
    return "bool" if info.dtype == torch.bool else "integer"
