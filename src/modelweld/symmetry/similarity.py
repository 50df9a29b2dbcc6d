"""Similarity of the units of several models: by their weights, and by their activations.

Both are Pearson correlations over (models · units). Weights are correlated module by module, so that no module's scale
drowns another's, and averaged with the number of features a unit has in it as their weights: with one vote per module a
head of five classes, which correlates by chance, spoils the match (measured in examples/fashion). `concatenate` gives
the paper's variant, where all features are concatenated. Source: MuDSC, arXiv 2403.01753.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modelweld.checkpoints.shards import disk_errors
from modelweld.errors import MergeError
from modelweld.symmetry.families import AxisUse, Family, Placement, view

# Two or fewer numbers per unit (a norm's gain and bias) always correlate to plus or minus one.
LEAST_FEATURES = 3
# How much of the sums is in memory at a time, and of how many samples.
STRIP_BYTES, SAMPLES = 1 << 25, 1024


def correlate(features: Tensor, rows: int | None = None) -> Tensor:
    """Pearson correlation of rows: all with all, or only the first `rows` with all others.

    Rows that never vary correlate with nothing.
    """
    centred = features - features.mean(dim=1, keepdim=True)  # (units, features)
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)  # (units, 1)
    scaled = centred.div_(norms.clamp(min=torch.finfo(features.dtype).tiny)).masked_fill_(norms == 0, 0.0)
    return scaled[:rows] @ scaled[rows:].T  # (all, all), or (rows, all - rows)


def between(similarity: Tensor, units: int, model: int) -> Tensor:
    """The first model's units against those of another one, out of either form: (units, units)."""
    start = (model if len(similarity) > units else model - 1) * units
    return similarity[:units, start : start + units]


def weight_similarity(
    family: Family,
    member: str,
    states: Sequence[Mapping[str, Tensor]],
    placed: Placement,
    *,
    uses: Sequence[AxisUse] | None = None,
    concatenate: bool = False,
    whole: bool = True,
) -> Tensor | None:
    """Correlation of a member's units by weights, or None where it lies on no tensor.

    The shape is (models · units, models · units), or without `whole` (units, (models - 1) · units): the first model's
    with the others'. `uses` are those that are looked at, by default all. One module's weights are in memory at once.
    """
    modules: dict[tuple[str, bool], list[AxisUse]] = {}
    for use in family.of(member) if uses is None else uses:
        # A weight and its bias are of one module; modules that read a unit and that make it are apart.
        key = ("", False) if concatenate else (use.tensor.rpartition(".")[0], use.dim > 0)
        modules.setdefault(key, []).append(use)
    if not modules:
        return None
    kinds = list(modules.values())
    telling = [kind for kind in kinds if sum(use.features for use in kind) >= LEAST_FEATURES]
    if not telling:
        telling = [[use for kind in kinds for use in kind]]
    total: Tensor | None = None
    count = sum(use.features for kind in telling for use in kind)
    for kind in telling:
        # (models, units, features)
        features = torch.cat([view(family, member, use, states, placed) for use in kind], dim=2)
        found = correlate(features.flatten(0, 1), None if whole else features.shape[1])  # (models · units, features)
        found *= sum(use.features for use in kind) / count
        total = found if total is None else total.add_(found)
    return total


class Activations:
    """Correlation of unit activations, accumulated batch by batch in float64 around a shift.

    Raw second moments lose all digits where the mean is large against the spread; shifting by the first batch's mean
    keeps them. With `rows`, only that many units, the first model's, are correlated, with all others. The sums of
    products are kept in `file` where one is given, of which a strip is in memory at a time.
    """

    def __init__(self, rows: int | None = None, file: Path | None = None) -> None:
        self._rows, self._file = rows, file
        self._shift: Tensor | None = None
        self._sum = torch.zeros(())
        self._squares = torch.zeros(())
        self._products: Sums | None = None
        self._count = 0

    def add(self, *batch: Tensor) -> None:
        """One (models · units, samples), or one (units, samples) per model; MergeError where they are not finite."""
        samples = batch[0].shape[1]
        chunks = [[part[:, start : start + SAMPLES] for part in batch] for start in range(0, samples, SAMPLES)]
        for chunk in chunks:
            self._summed(torch.cat([part.double() for part in chunk]))  # (models · units, samples)
        shift, sums = self._shift, self._products
        if shift is None or sums is None:
            return

        def shifted(chunk: Sequence[Tensor], rows: slice) -> Tensor:
            # Only the rows that are asked for: of a wide layer the whole in float64 is larger than the sums.
            ends = list(accumulate(len(part) for part in chunk))
            taken = [
                part[max(0, rows.start - end + len(part)) : max(0, rows.stop - end + len(part))]
                for part, end in zip(chunk, ends, strict=True)
            ]
            return torch.cat([part.double() for part in taken]).sub_(shift[rows])  # (rows, samples)

        first, total = self._rows or 0, len(shift)

        def add_up(rows: slice, strip: Tensor) -> None:
            for chunk in chunks:
                strip.addmm_(shifted(chunk, rows), shifted(chunk, slice(first, total)).T)  # (rows, others)

        sums.change(add_up)
        self._count += samples

    def _summed(self, values: Tensor) -> None:
        if not torch.isfinite(values.sum()):
            raise MergeError("an activation is not finite", hint="look for overflow in the experts, or mask the row")
        if self._products is None or self._shift is None:
            units = len(values)
            self._shift = values.mean(dim=1, keepdim=True)  # (units, 1)
            self._sum = torch.zeros(units, 1, dtype=torch.float64)
            self._squares = torch.zeros(units, dtype=torch.float64)
            rows = units if self._rows is None else self._rows
            self._products = Sums(rows, units if self._rows is None else units - rows, self._file)
        values.sub_(self._shift)
        self._sum += values.sum(dim=1, keepdim=True)
        self._squares += torch.linalg.vecdot(values, values)  # (units,)

    def correlation(self) -> Tensor:
        """The correlation of all that was added; raises MergeError without at least two samples."""
        if self._products is None or self._count < 2:
            raise MergeError("no activations to correlate", hint="give a calibration set of a few hundred rows")
        deviation = (self._squares - self._sum[:, 0] ** 2 / self._count).clamp(min=0).sqrt()  # (units,)
        others, summed = deviation[self._rows :], self._sum[self._rows :]
        found = self._products.read()  # (units, units), or (rows, units - rows)
        # Covariance, then correlation, in place: these matrices are the largest there are.
        found.addmm_(self._sum[: len(found)], summed.T, alpha=-1.0 / self._count)
        return found.mul_(_inverse(deviation[: len(found), None])).mul_(_inverse(others))


def _inverse(deviation: Tensor) -> Tensor:
    return torch.where(deviation > 0, 1.0 / deviation, 0.0)


class Sums:
    """A matrix of sums in float64, in memory or in a file."""

    def __init__(self, rows: int, columns: int, file: Path | None) -> None:
        self._shape, self._file = (rows, columns), file
        self._held = torch.zeros((rows, columns) if file is None else 0, dtype=torch.float64)
        if file is not None:
            with disk_errors(file), file.open("wb") as made:
                made.truncate(8 * rows * columns)

    def change(self, change: Callable[[slice, Tensor], None]) -> None:
        """Call `change` with the numbers of some rows and these, which it alters in place, until all were passed."""
        rows, columns = self._shape
        if self._file is None:
            change(slice(0, rows), self._held)
            return
        strip = max(1, STRIP_BYTES // max(1, 8 * columns))
        with disk_errors(self._file), self._file.open("r+b", buffering=0) as opened:
            for start in range(0, rows, strip):
                count = min(strip, rows - start)
                opened.seek(8 * start * columns)
                held = np.fromfile(opened, np.float64, count * columns).reshape(count, columns)
                change(slice(start, start + count), torch.from_numpy(held))
                opened.seek(8 * start * columns)
                held.tofile(opened)

    def read(self) -> Tensor:
        """A copy of the whole matrix."""
        if self._file is None:
            return self._held.clone()
        with disk_errors(self._file):
            return torch.from_numpy(np.fromfile(self._file, np.float64)).reshape(self._shape)
