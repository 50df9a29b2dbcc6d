"""Zip at growing widths against the definition, which searches the whole matrix at every step.

To run: OMP_NUM_THREADS=1 python benchmarks/zip.py [--widths 256 512 1024 2048 4096] [--rounds 5] [--limit 120]
Two models, random features; all must give the same clusters. The definition is timed as one would write it in torch,
and in numpy, whose argmax is an order of magnitude faster. Where it would take longer than `limit` seconds its time is
extrapolated from the last width (eight times for twice the width), and the row says so.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modelweld.symmetry.zipping import zip_units

MODELS, BETA = 2, 0.5


def naive_numpy(similarities: NDArray[np.float32]) -> NDArray[np.int64]:
    """Clusters by an argmax over the whole matrix a merge."""
    matrix = similarities.copy()
    total = len(matrix)
    np.fill_diagonal(matrix, -np.inf)
    owner = np.arange(total)
    for _ in range(total - total // MODELS):
        low, high = sorted(divmod(int(matrix.argmax()), total))
        row = np.minimum(matrix[low], matrix[high]) * np.float32(BETA)
        row[[low, high]] = -np.inf
        matrix[low], matrix[:, low] = row, row
        matrix[high], matrix[:, high] = -np.inf, -np.inf
        owner[owner == high] = low
    return np.unique(owner, return_inverse=True)[1].astype(np.int64)


def naive_torch(similarities: NDArray[np.float32]) -> NDArray[np.int64]:
    """The same, in torch."""
    matrix = torch.from_numpy(similarities.copy())
    total = len(matrix)
    matrix.fill_diagonal_(-torch.inf)
    owner = np.arange(total)
    for _ in range(total - total // MODELS):
        low, high = sorted(divmod(int(matrix.argmax()), total))
        row = torch.minimum(matrix[low], matrix[high]) * BETA
        row[[low, high]] = -torch.inf
        matrix[low], matrix[:, low] = row, row
        matrix[high], matrix[:, high] = -torch.inf, -torch.inf
        owner[owner == high] = low
    return np.unique(owner, return_inverse=True)[1].astype(np.int64)


NAIVE = {"numpy": naive_numpy, "torch": naive_torch}


def similarity(width: int) -> NDArray[np.float32]:
    """Correlation of random units of which the second model's are noisy copies."""
    generator = np.random.default_rng(width)
    first = generator.standard_normal((width, 64), dtype=np.float32)
    noise = generator.standard_normal((width, 64), dtype=np.float32)
    second = first[generator.permutation(width)] + np.float32(0.7) * noise
    found = np.corrcoef(np.concatenate([first, second]), dtype=np.float32)
    return np.ascontiguousarray((found + found.T) / 2)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120.0)
    asked = parser.parse_args()
    compiled, _ = timed(lambda: zip_units(similarity(8), MODELS))
    print(json.dumps({"first_call_seconds": round(compiled, 2)}), flush=True)
    before: dict[str, tuple[int, float]] = {}
    times: list[tuple[int, float]] = []
    for width in asked.widths:
        matrix = similarity(width)
        rounds = [timed(lambda given=matrix: zip_units(given, MODELS, beta=BETA)) for _ in range(asked.rounds)]
        seconds = statistics.median(took for took, _ in rounds)
        times.append((width, seconds))
        row: dict[str, Any] = {"width": width, "seconds": round(seconds, 5)}
        for name, naive in NAIVE.items():
            last_width, last = before.get(name, (width, 0.0))
            expected = last * (width / last_width) ** 3
            if expected < asked.limit:
                repeats = asked.rounds if expected < asked.limit / 60 else 1
                runs = [timed(lambda given=matrix, run=naive: run(given)) for _ in range(repeats)]
                expected = statistics.median(took for took, _ in runs)
                row[f"equal_{name}"] = bool((rounds[0][1].cluster == runs[0][1]).all())
                row[f"naive_{name}"] = round(expected, 3)
            else:
                row[f"naive_{name}_extrapolated"] = round(expected, 1)
            before[name] = (width, expected)
            row[f"times_{name}"] = round(expected / seconds, 1)
        if len(times) > 1:
            (narrow, short), (wide, long) = times[-2:]
            row["growth_exponent"] = round(math.log(long / short) / math.log(wide / narrow), 2)
        print(json.dumps(row), flush=True)
    (narrow, short), (wide, long) = times[0], times[-1]
    if wide > narrow:
        print(json.dumps({"growth_exponent": round(math.log(long / short) / math.log(wide / narrow), 2)}))


if __name__ == "__main__":
    main()
