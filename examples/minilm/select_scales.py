"""Choose the `scale` of every merge in params.yaml, each method alone, on validation rows and nothing else.

    python examples/minilm/select_scales.py                      # params.yaml of the demo
    python examples/minilm/select_scales.py showcase --scales 0.4 0.7 1.0 1.5

For each method that has a scale, the experts are merged at every one of `--scales` (one `modelweld merge --grid`) and
each candidate is scored on the validation rows of every task: the mean, and the worst, of its accuracy over its
expert's. What does best by the mean is to be written into params.yaml by hand; the test rows are not read.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import finetune
import torch
import yaml
from recipe import PLACES, Recipe
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import modelweld
from modelweld.config import load_params, load_recipe
from modelweld.stages.grid import merge_grid

ROOT = Path(__file__).resolve().parents[2]
PARAMS = {"demo": ROOT / "params.yaml", "showcase": PLACES["showcase"][1].with_name("params.yaml")}
SCALES = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)


class Validation:
    """The validation rows of every task, and what the layers that no expert changed make of them."""

    def __init__(self, recipe: Recipe) -> None:
        base = recipe.out / "models" / "base"
        self.above = recipe.training.frozen_layers
        self.base = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(base)
        self.rows = {}
        for task in recipe.experts:
            _, splits = finetune.read_splits(recipe.out / "texts" / task, tokenizer, recipe.training.max_length)
            self.rows[task] = splits["validation"]
            finetune.freeze(self.base, {"validation": splits["validation"]}, self.above, lambda _: None)

    def accuracy(self, model: Any, task: str) -> float:
        """The accuracy of a model with the task's head."""
        if self.above:
            self._require_frozen(model)
        return finetune.accuracy(model.eval(), self.rows[task], self.above, lambda _: None)

    def _require_frozen(self, model: Any) -> None:
        for name in ("embeddings", *(f"encoder.layer.{layer}" for layer in range(self.above))):
            ours, base = model.bert.get_submodule(name).state_dict(), self.base.get_submodule(name).state_dict()
            # Means of equal weights may differ from them in the last bit.
            if not all(torch.allclose(ours[key], base[key], rtol=1e-5, atol=1e-7) for key in base):
                raise SystemExit(f"{name} differs from the base, though training froze it: what was kept is no use")


def shares(validation: Validation, candidate: Path, experts: dict[str, float]) -> list[float]:
    """Accuracy over the expert's, for each task."""
    return [
        validation.accuracy(modelweld.load(candidate, task=task), task) / expert for task, expert in experts.items()
    ]


def candidates(method: dict[str, Any], recipe: Recipe, scales: list[float], out: Path) -> dict[str, Path]:
    """A merge of the experts at every scale."""
    models = recipe.out / "models"
    document = {key: value for key, value in method.items() if key != "scale"} | {
        "base": str(models / "base"),
        "models": {task: {"path": str(models / task)} for task in recipe.experts},
    }
    file = out / "recipe.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    if "scale" not in method:
        modelweld.merge(load_recipe(file), out / "merged")
        return {"no scale": out / "merged"}
    return {key: out / "merged" / key for key in merge_grid(load_recipe(file), {"scale": scales}, out / "merged")}


def methods(params: Path) -> dict[str, dict[str, Any]]:
    """The parameters of every merge in params.yaml, by name."""
    load_params(params)
    document = yaml.safe_load(params.read_text(encoding="utf-8"))
    return document["baselines"] | {"merged": document["merge"]}


def main() -> None:
    """Print one line for each candidate, and the best of each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(PARAMS), default="demo")
    parser.add_argument("--scales", nargs="+", type=float, default=list(SCALES))
    parser.add_argument("--methods", nargs="+", help="some of the names in params.yaml; default: all")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    recipe = Recipe.read(arguments.name)
    validation = Validation(recipe)
    experts = {task: validation.accuracy(modelweld.load(recipe.out / "models" / task), task) for task in recipe.experts}
    print("expert accuracy:", ", ".join(f"{task} {value:.3f}" for task, value in experts.items()), flush=True)
    for name, method in methods(PARAMS[arguments.name]).items():
        if arguments.methods and name not in arguments.methods:
            continue
        with tempfile.TemporaryDirectory() as folder:
            means = {}
            for key, path in candidates(method, recipe, arguments.scales, Path(folder)).items():
                found = shares(validation, path, experts)
                means[key] = fmean(found)
                each = " ".join(f"{share:.3f}" for share in found)
                print(f"{name:<16} {key:<12} mean {means[key]:.3f} worst {min(found):.3f}  ({each})", flush=True)
            print(f"{name:<16} best: {max(means, key=lambda key: means[key])}", flush=True)


if __name__ == "__main__":
    main()
