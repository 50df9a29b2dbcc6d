"""How fast DRM is: against the float32 SVD that defines it, its floor, and from LoRA factors instead of dense.

    python benchmarks/drm.py                 # the whole table, some minutes on two cores
    python benchmarks/drm.py --quick         # 768 x 768 only
    python benchmarks/drm.py --json out.json
    python benchmarks/drm.py --cpu-time      # one thread, processor seconds: for a machine that others use too

Ratios are taken in one run on the same input: every round times each contender once, and the best round counts. The
floor is the matrix products (at the float64 GEMM rate measured in the same run) plus one float64 `eigh`. The shares
say where a merge's time goes: products as many as are really made (half of a Gram matrix follows from the other half)
at that rate, `eigh` and the threshold timed alone, and all the rest. Errors are relative to the float64 SVD of the
definition, where that is affordable. `pairs` is how the engine works on two cores, two weights at a time with a thread
each, beside the SVD with two threads on one after the other; it needs a quiet machine and two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from modelweld.methods import LowRank, drm
from modelweld.methods.numerics.selection import quota_threshold

DROP_RATE = 0.8
SHAPES = [(768, 768, 3), (768, 768, 5), (768, 3072, 3), (768, 3072, 5), (2048, 2048, 3), (2048, 2048, 5)]
GRAM = 0.625  # of a Gram matrix's products that are made


def by_svd(deltas: Tensor, *, vertical: bool) -> Tensor:
    """The definition as it is written: a full SVD of the wide (or tall) matrix, in the stack's own dtype."""
    count, n, m = deltas.shape
    if vertical:
        left, sigma, right = torch.linalg.svd(deltas.reshape(count * n, m), full_matrices=False)
        keep = sigma > drm.RANK_TOLERANCE * sigma[0]
        blocks, basis = left[:, keep].reshape(count, n, -1).mT, right[keep].mT
    else:
        left, sigma, right = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
        keep = sigma > drm.RANK_TOLERANCE * sigma[0]
        blocks, basis = right[keep].reshape(-1, count, m).transpose(0, 1), left[:, keep]
    norms = blocks.norm(dim=2, keepdim=True)
    unit = blocks / norms  # (N, r, m)
    k = unit.numel() - round(unit.numel() * (1 - DROP_RATE))
    threshold = unit.abs().flatten().kthvalue(k).values
    entries = unit * (unit.abs() >= threshold) * sigma[keep][None, :, None] * norms
    entries = entries * (entries.sign() == entries.sum(0).sign())
    merged: Tensor = basis @ (entries.sum(0) / (entries != 0).sum(0).clamp(min=1))
    return merged.mT if vertical else merged


def best(contenders: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each contender's best round; they take turns so that a busy machine is busy for all."""
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            call()
            seconds[name] = min(seconds[name], clock() - start)
    return seconds


def gemm_rate(rounds: int, clock: Callable[[], float]) -> float:
    """float64 flops a second of a large product on this machine, now."""
    a = torch.randn(1536, 1536, dtype=torch.float64)
    return 2 * 1536**3 / best({"gemm": lambda: a @ a}, rounds, clock)["gemm"]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def dense_row(
    n: int, m: int, count: int, direction: str, rounds: int, clock: Callable[[], float], check: bool
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(n + m + count)
    deltas = torch.randn(count, n, m, generator=generator) * 1e-3
    vertical = direction == "vertical"
    side, length = (m, n) if vertical else (n, m)
    size = min(side, count * length)  # of the Gram matrix: the smaller side of [D_1 | … | D_N]
    gram = torch.randn(size, size, dtype=torch.float64, generator=generator)
    gram = gram @ gram.mT
    basis = drm.factorise(deltas, direction=direction)
    quota = torch.tensor(basis.directions.numel())
    seconds = best(
        {
            "modelweld": lambda: drm.merge(deltas, direction=direction, drop_rate=DROP_RATE),
            "svd_float32": lambda: by_svd(deltas, vertical=vertical),
            "eigh": lambda: torch.linalg.eigh(gram),
            "threshold": lambda: quota_threshold(basis.directions, quota, 1 - DROP_RATE),
        },
        rounds,
        clock,
    )
    # The Gram matrix, the other side's basis, and the way back: what this route cannot do without.
    rate, product = gemm_rate(rounds, clock), 2 * size * side * length
    floor = (2 * count + 1) * product / rate + seconds["eigh"]
    shares = {
        "products": ((1 + GRAM) * count + 1) * product / rate / seconds["modelweld"],
        "eigh": seconds["eigh"] / seconds["modelweld"],
        "threshold": seconds["threshold"] / seconds["modelweld"],
    }
    shares["rest"] = 1 - sum(shares.values())
    row: dict[str, object] = {
        "weight": f"{n}x{m}",
        "models": count,
        "direction": direction,
        "modelweld_s": round(seconds["modelweld"], 4),
        "svd_float32_s": round(seconds["svd_float32"], 4),
        "faster_than_svd": round(seconds["svd_float32"] / seconds["modelweld"], 2),
        "times_the_floor": round(seconds["modelweld"] / floor, 2),
        "shares": {name: round(share, 2) for name, share in shares.items()},
    }
    if check:
        exact = by_svd(deltas.double(), vertical=vertical)
        row["error"] = relative(drm.merge(deltas, direction=direction, drop_rate=DROP_RATE), exact)
        row["svd_float32_error"] = relative(by_svd(deltas, vertical=vertical), exact)
    return row


def pair_row(n: int, m: int, count: int, direction: str, rounds: int) -> dict[str, object]:
    """Two weights on two cores, by the wall clock: two merges side by side, and two SVDs with two threads each."""
    generator = torch.Generator().manual_seed(n + m + count)
    weights = [torch.randn(count, n, m, generator=generator) * 1e-3 for _ in range(2)]

    def side_by_side() -> None:
        torch.set_num_threads(1)
        list(pool.map(lambda deltas: drm.merge(deltas, direction=direction, drop_rate=DROP_RATE), weights))

    def one_after_the_other() -> None:
        torch.set_num_threads(2)
        for deltas in weights:
            by_svd(deltas, vertical=direction == "vertical")

    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        contenders = {"modelweld": side_by_side, "svd_float32": one_after_the_other}
        seconds = best(contenders, rounds, time.perf_counter)
    return {
        "weight": f"{n}x{m}",
        "models": count,
        "direction": direction,
        "modelweld_s": round(seconds["modelweld"], 4),
        "svd_float32_s": round(seconds["svd_float32"], 4),
        "faster_than_svd": round(seconds["svd_float32"] / seconds["modelweld"], 2),
    }


def lora_row(n: int, m: int, count: int, rank: int, rounds: int, clock: Callable[[], float]) -> dict[str, object]:
    generator = torch.Generator().manual_seed(rank)
    factors = [
        LowRank(torch.randn(n, rank, generator=generator), torch.randn(rank, m, generator=generator))
        for _ in range(count)
    ]
    dense = torch.stack([factor.dense() for factor in factors])
    seconds = best(
        {
            "factors": lambda: drm.merge_low_rank(factors, drop_rate=DROP_RATE),
            "dense": lambda: drm.merge(dense, drop_rate=DROP_RATE),
            "svd_float32": lambda: by_svd(dense, vertical=False),
        },
        rounds,
        clock,
    )
    exact = torch.stack([factor.B.double() @ factor.A.double() for factor in factors])
    from_factors = drm.merge_low_rank(factors, drop_rate=DROP_RATE).dense()
    return {
        "weight": f"{n}x{m}",
        "models": count,
        "rank": rank,
        "factors_s": round(seconds["factors"], 5),
        "dense_s": round(seconds["dense"], 4),
        "svd_float32_s": round(seconds["svd_float32"], 4),
        "faster_than_dense": round(seconds["dense"] / seconds["factors"], 1),
        "faster_than_svd": round(seconds["svd_float32"] / seconds["factors"], 1),
        "error": relative(from_factors, drm.merge(exact, drop_rate=DROP_RATE)),
    }


def sweep_row(n: int, m: int, count: int, rounds: int, clock: Callable[[], float]) -> dict[str, object]:
    """Ten drop rates from one factorisation, beside one merge."""
    deltas = torch.randn(count, n, m, generator=torch.Generator().manual_seed(0)) * 1e-3
    rates = [0.05 + index / 10 for index in range(10)]

    def sweep() -> None:
        basis = drm.factorise(deltas)
        for rate in rates:
            drm.finish(basis, drop_rate=rate)

    seconds = best({"one": lambda: drm.merge(deltas, drop_rate=DROP_RATE), "ten": sweep}, rounds, clock)
    return {
        "weight": f"{n}x{m}",
        "models": count,
        "one_s": round(seconds["one"], 4),
        "ten_s": round(seconds["ten"], 4),
        "ten_over_one": round(seconds["ten"] / seconds["one"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="768 x 768 only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor seconds")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    threads = 1 if options.cpu_time else options.threads
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    result: dict[str, object] = {
        "threads": threads,
        "clock": "processor" if options.cpu_time else "wall",
        "torch": torch.__version__,
        "load_before": [round(load, 1) for load in os.getloadavg()],
    }
    rows: list[dict[str, object]] = []
    for n, m, count in SHAPES[:2] if options.quick else SHAPES:
        for direction in ("horizontal", "vertical"):
            rows.append(dense_row(n, m, count, direction, options.rounds, clock, check=max(n, m) <= 768))
            print(rows[-1], flush=True)
    result["dense"] = rows
    if threads > 1:
        pairs = [shape for shape in (SHAPES[:2] if options.quick else SHAPES) if shape[0] == shape[1]]
        result["pairs"] = [
            pair_row(*shape, direction, options.rounds) for shape in pairs for direction in ("horizontal", "vertical")
        ]
        torch.set_num_threads(threads)
        print(result["pairs"], flush=True)
    result["lora"] = [lora_row(768, 768, 5, 16, options.rounds * 3, clock)]
    print(result["lora"], flush=True)
    result["sweep"] = [
        sweep_row(n, n, count, options.rounds, clock)
        for n, _, count in (SHAPES[:2] if options.quick else [*SHAPES[:2], *SHAPES[4:]])
    ]
    print(result["sweep"], flush=True)
    result["load_after"] = [round(load, 1) for load in os.getloadavg()]
    print({key: result[key] for key in ("threads", "clock", "torch", "load_before", "load_after")})
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
