"""How long `least_interference` takes beside DRM, which has one eigenproblem per weight, and from LoRA factors.

    python benchmarks/subspace_speed.py              # 768 x 768, 768 x 3072 and 2048 x 2048, minutes on two cores
    python benchmarks/subspace_speed.py --quick      # 768 x 768 only
    python benchmarks/subspace_speed.py --cpu-time   # one thread, processor seconds: for a machine that others use too

Ratios are taken in one run on the same input: every round times each contender once, and the best round counts. `both`
has the powers 1, which need the two eigenproblems of the sides; `both_flat` has the recommended powers 0.75 and 0.5,
which decompose every task vector as well. `grid` is eight values of the ridge from one factorisation.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.drm import best
from modelweld.methods import LowRank, drm, least_interference, tsv_m

SHAPES = [(768, 768, 3), (768, 768, 6), (768, 3072, 3), (3072, 768, 3), (2048, 2048, 3)]
RIDGES = [0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3]


def dense_row(n: int, m: int, count: int, rounds: int, clock: Callable[[], float]) -> dict[str, object]:
    """Seconds of each contender, and each one's ratio to DRM-H."""
    deltas = torch.randn(count, n, m, generator=torch.Generator().manual_seed(n + m + count)) * 1e-3

    def grid() -> None:
        found = least_interference.factorise(deltas)
        for ridge in RIDGES:
            least_interference.finish(found, ridge=ridge)

    seconds = best(
        {
            "drm_h": lambda: drm.merge(deltas),
            "tsv_m": lambda: tsv_m.merge(deltas),
            "input": lambda: least_interference.merge(deltas),
            "both": lambda: least_interference.merge(deltas, side="both", power=1.0, target_power=1.0),
            "both_flat": lambda: least_interference.merge(deltas, side="both"),
            "grid": grid,
        },
        rounds,
        clock,
    )
    ratios = {f"{name}_over_drm_h": round(spent / seconds["drm_h"], 2) for name, spent in seconds.items()}
    return {"weight": f"{n}x{m}", "models": count, **{k: round(v, 4) for k, v in seconds.items()}, **ratios}


def lora_row(n: int, m: int, count: int, rank: int, rounds: int, clock: Callable[[], float]) -> dict[str, object]:
    """Seconds from factors and from the dense matrices, and the relative difference of the results."""
    generator = torch.Generator().manual_seed(rank)
    factors = [
        LowRank(torch.randn(n, rank, generator=generator), torch.randn(rank, m, generator=generator))
        for _ in range(count)
    ]
    dense = torch.stack([factor.B.double() @ factor.A.double() for factor in factors])
    row: dict[str, object] = {"weight": f"{n}x{m}", "models": count, "rank": rank}
    for side in ("input", "both"):
        contenders = {
            "factors": lambda side=side: least_interference.merge_low_rank(factors, side=side),
            "dense": lambda side=side: least_interference.merge(dense, side=side),
        }
        seconds = best(contenders, rounds, clock)
        exact = least_interference.merge(dense, side=side)
        found = least_interference.merge_low_rank(factors, side=side).dense()
        row[side] = {
            "factors_s": round(seconds["factors"], 5),
            "dense_s": round(seconds["dense"], 4),
            "faster": round(seconds["dense"] / seconds["factors"], 1),
            "error": float((found - exact).norm() / exact.norm()),
        }
    return row


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
    rows = []
    for shape in SHAPES[:2] if options.quick else SHAPES:
        rows.append(dense_row(*shape, options.rounds, clock))
        print(rows[-1], flush=True)
    result["dense"] = rows
    result["lora"] = [lora_row(768, 768, 6, 16, options.rounds, clock)]
    print(result["lora"], flush=True)
    result["load_after"] = [round(load, 1) for load in os.getloadavg()]
    print({key: result[key] for key in ("threads", "clock", "torch", "load_before", "load_after")})
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
