"""Stages `pair` and `table`: two experts merged every way there is, then mean and spread over the pairs.

Run it through the pipeline: python examples/fashion/prepare.py
"""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from torch import Tensor
from train import MEAN, SPREAD
from weld import Pair, Placed, Results, Rows, compare, logits_of, merged, repaired, score

from modelweld.reporting.alignment import plot_alpha, plot_identity, plot_similarity
from modelweld.reporting.landscape import plot_landscape
from modelweld.symmetry.observing import observe
from modelweld.symmetry.placements import Permuted

HERE = Path(__file__).resolve().parent


def load_expert(folder: Path) -> Any:
    """A trained expert in evaluation mode."""
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()


def make_pair(folders: tuple[Path, Path], inputs: Tensor) -> Pair:
    """The pair of experts in two folders."""
    experts = (load_expert(folders[0]), load_expert(folders[1]))
    config = type(experts[0].config).from_dict(experts[0].config.to_dict())
    labels = [label for expert in experts for label in expert.config.id2label.values()]
    config.id2label, config.label2id = dict(enumerate(labels)), {label: number for number, label in enumerate(labels)}
    return Pair.of(experts, lambda: type(experts[0])(config), inputs)


def read_rows(tasks: dict[str, list[str]], split: str, most: int) -> Rows:
    """Up to `most` rows of each task's split, the tasks' rows in turn, so that any leading part holds both."""
    inputs, classes = [], []
    offset = 0
    for task, names in tasks.items():
        frame = pd.read_parquet(HERE / "images" / task / f"{split}.parquet").head(most)
        pixels = np.stack([np.array(Image.open(io.BytesIO(raw))) for raw in frame["image"]])
        inputs.append((torch.from_numpy(pixels).float().unsqueeze(1) / 255 - MEAN) / SPREAD)
        numbers = {name: offset + number for number, name in enumerate(names)}
        classes.append(torch.tensor(frame["label"].map(numbers).to_numpy()))
        offset += len(names)
    return Rows(torch.stack(inputs, 1).flatten(0, 1), torch.stack(classes, 1).flatten())


def document(results: Results) -> dict[str, Any]:
    """A pair's results as JSON."""
    return {
        "systems": {
            name: {"tasks": list(one.tasks), "per_task": one.per_task, "joint": one.joint}
            for name, one in results.scores.items()
        },
        "alpha": results.chosen,
        "curves": {name: [[a, value] for a, value in curve.items()] for name, curve in results.curves.items()},
    }


def plane(pair: Pair, placed: Permuted, calibration: Rows, rows: Rows, steps: int) -> dict[str, Any]:
    """Accuracy of each task on the plane through both experts and their merge in the first one's units.

    A point's heads move with its backbone: at either expert both heads stand in that expert's own units.
    """
    spec, states = pair.spec, pair.states
    to_second = spec.invert(placed.assignments[1])
    corners: list[dict[str, Tensor]] = []
    for number in (0, 1):
        heads = {
            name: torch.cat(
                [
                    spec.apply_to(name, states[0][name], to_second) if number else states[0][name],
                    states[1][name] if number else placed.tensor(name, states[1][name], 1),
                ]
            )
            for name in pair.heads
        }
        corners.append({**states[number], **heads})
    corners.append(dict(merged(pair, placed).state_dict()))
    floating = [name for name, tensor in corners[0].items() if tensor.is_floating_point() and "running" not in name]
    a, b, m = (torch.cat([corner[name].flatten().double() for name in floating]) for corner in corners)
    right = b - a
    across = float(right.norm())
    right /= across
    up = (m - a) - right * float((m - a) @ right)
    height = float(up.norm())
    up /= height
    points = {
        "expert 1": (0.0, 0.0), "expert 2": (across, 0.0), "merge": (float((m - a) @ right), height)
    }  # fmt: skip
    xs = np.linspace(-0.25 * across, 1.25 * across, steps)
    ys = np.linspace(-0.4 * height, 1.6 * height, steps)
    classes = int(rows.classes.max()) // 2 + 1
    tasks = np.zeros((2, steps, steps))
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            vector = a + right * float(x) + up * float(y)
            state = dict(corners[0])
            at = 0
            for name in floating:
                size = corners[0][name].numel()
                state[name] = vector[at : at + size].reshape(corners[0][name].shape).float()
                at += size
            model = pair.joint().eval()
            model.load_state_dict(state)
            found = score(logits_of(repaired(model, calibration), rows), rows, classes)
            tasks[:, row, column] = found.tasks
    return {"x": xs.tolist(), "y": ys.tolist(), "points": points, "tasks": tasks.tolist()}


def similarities(pair: Pair, placed: Placed, rows: Rows) -> dict[str, Any]:
    """The first expert's units against the second's, by activations, before and after alignment: the widest group."""
    found = observe(list(pair.experts), pair.spec, rows.batches())
    free = [name for name in found if not pair.spec.groups[name].within]
    group = max(free, key=lambda name: pair.spec.groups[name].size)
    units = pair.spec.groups[group].size
    between = found[group][:units, units:]
    return {"group": group, "before": between.tolist(), "after": between[:, placed.assignments[1][group]].tolist()}


def merge_pair(name: str, settings: dict[str, Any]) -> None:
    """Write figures/<pair>/scores.json, with the plots and their data."""
    started = time.perf_counter()
    torch.set_num_threads(settings["merging"]["threads"])
    how, tasks = settings["merging"], settings["tasks"]
    calibration = read_rows(tasks, "train", how["calibration"] // 2)
    validation = read_rows(tasks, "validation", how["validation"] // 2)
    test = read_rows(tasks, "test", settings["split"]["test"])
    names = settings["pairs"][name]
    pair = make_pair((HERE / "models" / names["first"], HERE / "models" / names["second"]), test.inputs)
    results, placements = compare(
        pair, calibration, validation, test, alphas=how["alphas"], observed=how["observed"], seed=how["seed"]
    )
    out = HERE / "figures" / name
    out.mkdir(parents=True, exist_ok=True)
    aligned = placements["MuDSC align"]
    if not isinstance(aligned, Permuted):
        raise TypeError("an alignment holds permutations")
    few = Rows(calibration.inputs[:250], calibration.classes[:250])
    heat = similarities(pair, aligned, few)
    shares = identity_by_group(pair, aligned)
    ground = plane(pair, aligned, few, Rows(validation.inputs[:500], validation.classes[:500]), how["landscape"])
    plot_alpha(results.curves, out / "alpha.png")
    plot_identity(shares, out / "identity.png")
    plot_similarity(np.array(heat["before"]), np.array(heat["after"]), heat["group"], out / "similarity.png")
    plot_landscape(ground, list(tasks), out / "landscape.png")
    record = document(results) | {"identity": shares, "seconds": round(time.perf_counter() - started, 1)}
    (out / "landscape.json").write_text(json.dumps(ground) + "\n", encoding="utf-8")
    (out / "scores.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def identity_by_group(pair: Pair, placed: Permuted) -> dict[str, float]:
    """For each group the share of the second expert's units that stay where they are."""
    shares = {}
    for name, moved in placed.assignments[1].items():
        home = torch.arange(moved.shape[-1]).expand_as(moved)
        shares[name] = float((moved == home).double().mean())
    return shares


def table(folder: Path, pairs: list[str]) -> str:
    """Markdown: per-task and joint accuracy of every system, mean ± sample deviation over pairs, a block a family."""
    families: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        found = json.loads((folder / pair / "scores.json").read_text(encoding="utf-8"))
        families.setdefault(pair.rsplit("-", 1)[0], []).append(found)
    lines = []
    for family, records in families.items():
        lines += [f"### {family}, {len(records)} pairs", "", "| system | per task | joint | α |", "|---|---|---|---|"]
        for system in records[0]["systems"]:
            cells = [
                _spread([record["systems"][system][figure] for record in records]) for figure in ("per_task", "joint")
            ]
            alphas = ", ".join(f"{record['alpha'][system]:g}" for record in records if system in record["alpha"])
            lines.append(f"| {system} | {cells[0]} | {cells[1]} | {alphas} |")
        lines.append("")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def main(what: str) -> None:
    settings = yaml.safe_load((HERE / "settings.yaml").read_text(encoding="utf-8"))
    if what == "table":
        text = table(HERE / "figures", list(settings["pairs"]))
        (HERE / "figures" / "table.md").write_text(text, encoding="utf-8")
        print(text)
    else:
        merge_pair(what, settings)


if __name__ == "__main__":
    main(sys.argv[1])
