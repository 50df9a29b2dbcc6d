"""Aligning two ViT-B/16 of random weights (86 M parameters each, float32) end to end: minutes by phase, peak memory.

Processor minutes are printed beside those of the clock, for a machine that others use too.

To run: python benchmarks/align.py [--rows 256] [--mode align] [--sweeps 100] [--layers 12]
The models, the calibration images and the recipe (`method: mudsc`) are made in a folder that is gone afterwards; the
merge runs in a process of its own. Models that share nothing are the hardest case: no sweep finds all units in place.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

# What `modelweld.alignment.search` calls one after the other.
PHASES = {"load": "load", "check_model": "check", "observe": "observe", "align": "match", "output_error": "check"}


def prepare(root: Path, asked: argparse.Namespace) -> Path:
    """Models, images and a recipe below `root`; the recipe's file."""
    import torch
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    labels = {number: str(number) for number in range(10)}
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        config = ViTConfig(num_hidden_layers=asked.layers, id2label=labels, label2id={v: k for k, v in labels.items()})
        ViTForImageClassification(config).save_pretrained(root / name)
        ViTImageProcessorPil().save_pretrained(root / name)
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(asked.rows):
        written = io.BytesIO()
        pixels = generator.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(written, "PNG")
        rows.append({"image": written.getvalue(), "label": "0"})
    (root / "images").mkdir()
    pd.DataFrame(rows).to_parquet(root / "images" / "train.parquet", index=False)
    recipe = {
        "method": "mudsc",
        "models": {name: {"path": str(root / name)} for name in ("one", "other")},
        "align": {
            "mode": asked.mode,
            "sweeps": asked.sweeps,
            "calibration": {"images": {"dataset": str(root / "images"), "split": "train", "image": "image"}},
            "rows": asked.rows,
        },
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return root / "recipe.yaml"


def measure(recipe: Path) -> None:
    """Run the recipe in this process; print the seconds of each phase, and what memory peaked at by its end."""
    from modelweld.alignment import search
    from modelweld.stages.merge import merge

    seconds: Counter[str] = Counter()
    processor: Counter[str] = Counter()
    started = time.perf_counter()

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before, used = time.perf_counter(), time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - before
                processor[name] += time.process_time() - used
                print(
                    json.dumps({"phase": name, **minutes(seconds[name], processor[name]), "peak_mb_so_far": peak_mb()})
                )

        return run

    for called, phase in PHASES.items():
        setattr(search, called, timed(phase, getattr(search, called)))
    search.zip_models = timed("match", search.zip_models)
    merge(recipe, recipe.parent / "merged")
    total = time.perf_counter() - started
    rest = minutes(total - sum(seconds.values()), time.process_time() - sum(processor.values()))
    print(json.dumps({"phase": "import, derive, read and write", **rest}))
    document = json.loads((recipe.parent / "merged" / "alignment.json").read_text(encoding="utf-8"))
    print(json.dumps({"sweeps": len(document["trace"]), "identity_share": document["identity_share"]}))
    print(json.dumps({**minutes(total, time.process_time()), "peak_gb": round(peak_mb() / 1000, 2)}))


def minutes(clock: float, processor: float) -> dict[str, float]:
    return {"minutes": round(clock / 60, 2), "processor_minutes": round(processor / 60, 2)}


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--mode", choices=("align", "zip"), default="align")
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.recipe is not None:
        measure(asked.recipe)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        with contextlib.redirect_stdout(sys.stderr):
            recipe = prepare(Path(name), asked)
        command = [sys.executable, __file__, "--recipe", str(recipe)]
        subprocess.run(command, cwd=name, check=True)


if __name__ == "__main__":
    main()
