"""Telling a LoRA adapter that was folded into half-precision weights by what is left of it: low rank under noise.

Rounding W₀ + BA to bfloat16 adds noise of known size to every entry, whose singular values end at a known edge. Above
the edge, and apart from it, stand the adapter's own directions; below it is as much noise as rounding makes. A full
finetune has no gap there, and more below.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from modelweld.checkpoints.buffers import bytes_of
from modelweld.checkpoints.checkpoint import Checkpoint
from modelweld.checkpoints.header import TensorInfo

_PRECISION = {torch.bfloat16: 8, torch.float16: 11}  # significant binary digits
_WEIGHTS = 3
_LOOKS = 12
_LEAST_SIDE = 128
_ROWS = 256
_ELEMENTS = 1 << 22
# Measured on deltas of rank 4 to 64 and on power laws of every slope: what tells the former from the latter.
_ABOVE = 1.2
_GAP = 1.25
_NOISE = (0.7, 1.1)


def folded_rank(base: Checkpoint, expert: Checkpoint, names: Mapping[str, str]) -> int | None:
    """The rank of the adapter that a half-precision expert seems to be; None where it is none, or unknown.

    `names` maps the base's names to the expert's. Of a few weights the leading rows are read and compared: most of
    those that were changed must be a low-rank delta under the noise of its rounding.
    """
    candidates = [(base.tensors[name], expert.tensors[stored]) for name, stored in sorted(names.items())]
    candidates = [(theirs, mine) for theirs, mine in candidates if _suits(theirs, mine)]
    step = max(1.0, len(candidates) / _LOOKS)
    found: list[int | None] = []
    for place in range(min(_LOOKS, len(candidates))):
        theirs, mine = candidates[int(place * step)]
        before, after = _leading_rows(base, theirs), _leading_rows(expert, mine)
        if not torch.equal(after, before.to(after.dtype)):
            found.append(_rank_above_noise(before, after))
        # Two of three decide.
        if len(found) == _WEIGHTS or (len(found) == 2 and (found[0] is None) == (found[1] is None)):
            break
    ranks = [rank for rank in found if rank is not None]
    return round(statistics.median(ranks)) if 2 * len(ranks) > len(found) else None


def _suits(theirs: TensorInfo, mine: TensorInfo) -> bool:
    return (
        mine.dtype in _PRECISION
        and theirs.dtype.is_floating_point
        and theirs.shape == mine.shape
        and len(mine.shape) == 2
        and min(mine.shape) >= _LEAST_SIDE
    )


def _leading_rows(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
    columns = info.shape[1]
    rows = min(info.shape[0], _ROWS, max(_LEAST_SIDE, _ELEMENTS // columns))
    raw = torch.empty(rows * columns * info.dtype.itemsize, dtype=torch.uint8)
    checkpoint.read_into(info.name, 0, bytes_of(raw))
    return raw.view(info.dtype).reshape(rows, columns)


def _rank_above_noise(before: Tensor, after: Tensor) -> int | None:
    """The singular values of the difference above rounding's edge; None without a gap there, or noise alone below it.

    A rounded entry is off by up to half a unit in its last place, evenly: a twelfth of the unit's square. The norm of
    such noise is at most about the largest root of a row's sum of variances and that of a column's.
    """
    delta = after.double() - before.double()  # (n, m)
    if not math.isfinite(float(delta.sum())):
        return None
    exponents = torch.frexp(after.float()).exponent
    units = torch.exp2((exponents - _PRECISION[after.dtype]).double())
    variances = torch.where(after != 0, units.square() / 12, 0.0)
    edge = float(variances.sum(1).max().sqrt() + variances.sum(0).max().sqrt())
    n, m = delta.shape
    gram = delta @ delta.mT if n <= m else delta.mT @ delta
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    rank = int((singular > _ABOVE * edge).sum())
    if not 0 < rank <= len(singular) // 4 or singular[rank - 1] < _GAP * singular[rank]:
        return None
    # Noise has no part in the directions that the delta fills.
    expected = float(variances.sum()) * (1 - rank / n) * (1 - rank / m)
    remainder = float(singular[rank:].square().sum())
    return rank if _NOISE[0] * expected <= remainder <= _NOISE[1] * expected and expected > 0 else None
