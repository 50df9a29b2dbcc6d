"""mergekit configurations: the recipe computes what their formula says, and what it cannot say is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from modelweld.config import load_recipe
from modelweld.config.mergekit import convert
from modelweld.errors import ConfigError
from modelweld.stages.merge import merge
from tests.support.families import deltas, weights_of, write_family

NAME = "model.layers.0.mlp.down_proj.weight"


def config(method: str, weights: tuple[float, ...] = (1.0, 1.0, 1.0), **rest: Any) -> dict[str, Any]:
    models = [{"model": f"e{i}", "parameters": {"weight": weight}} for i, weight in enumerate(weights)]
    return {"merge_method": method, "base_model": "base", "models": models} | rest


def trimmed(stack: torch.Tensor, density: float) -> torch.Tensor:
    keep = round(density * stack[0].numel())
    limits = [delta.abs().flatten().sort(descending=True).values[keep] for delta in stack]
    return torch.stack([delta * (delta.abs() >= limit) for delta, limit in zip(stack, limits, strict=True)])


def agreeing(stack: torch.Tensor) -> torch.Tensor:
    return torch.where(stack.sum(0) >= 0, 1, -1) == stack.sign()


FORMULAE = {
    "linear": (config("linear", (1.0, 2.0, 0.5)), lambda d: (d[0] + 2 * d[1] + 0.5 * d[2]) / 3.5),
    "task": (config("task_arithmetic", (0.4, 0.3, 0.2)), lambda d: 0.4 * d[0] + 0.3 * d[1] + 0.2 * d[2]),
    "task_normalized": (
        config("task_arithmetic", (4, 3, 1), parameters={"normalize": True, "lambda": 0.5}),
        lambda d: 0.5 * (4 * d[0] + 3 * d[1] + d[2]) / 8,
    ),
    "ties": (
        config("ties", (0.7, 0.7, 0.7), parameters={"density": 0.4, "int8_mask": True}),
        lambda d: (trimmed(d, 0.4) * agreeing(trimmed(d, 0.4))).sum(0) / agreeing(trimmed(d, 0.4)).sum(0).clamp(min=1),
    ),
    "ties_summed": (
        config("ties", (0.7, 0.7, 0.7), parameters={"density": 0.4, "normalize": False}),
        lambda d: 0.7 * (trimmed(d, 0.4) * agreeing(trimmed(d, 0.4))).sum(0),
    ),
}


@pytest.mark.parametrize("case", sorted(FORMULAE))
def test_an_imported_recipe_computes_the_formula(tmp_path: Path, case: str) -> None:
    document, formula = FORMULAE[case]
    imported = convert(document)
    assert imported.lost == ()
    root = write_family(tmp_path)
    (root / "recipe.yaml").write_text(yaml.safe_dump(imported.recipe))
    merge(load_recipe(root / "recipe.yaml"), root / "out")
    base, stack = deltas(root, NAME)
    assert torch.allclose(weights_of(root / "out")[NAME].double(), base + formula(stack), atol=1e-6)


def test_parameters_are_translated() -> None:
    dare = convert(config("dare_linear", parameters={"density": 0.3}, dtype="bfloat16")).recipe
    assert dare["drop_rate"] == 0.7
    assert dare["combine"] == "linear"
    assert dare["output"] == {"dtype": "bfloat16"}
    della = convert(config("della", parameters={"density": 0.6, "epsilon": 0.1, "lambda": 0.9})).recipe
    assert (della["drop_rate"], della["epsilon"], della["scale"], della["combine"]) == (0.4, 0.2, 0.9, "ties")
    crumbs = convert(config("breadcrumbs", parameters={"density": 0.9, "gamma": 0.02})).recipe
    assert (crumbs["density"], crumbs["gamma"], crumbs["combine"]) == (0.9, 0.02, "linear")
    models = ["org/Base-7B", {"model": "x/Chat.V2"}]
    slerp = convert({"merge_method": "slerp", "base_model": "x/Chat.V2", "models": models, "parameters": {"t": 0.3}})
    assert slerp.lost == ()
    assert list(slerp.recipe["models"]) == ["chat-v2", "base-7b"]
    assert slerp.recipe["t"] == 0.3
    stock = convert({"merge_method": "model_stock", "base_model": "b", "models": ["b", "a/x", "c/x"]}).recipe
    assert stock["models"] == {"x": {"path": "a/x"}, "x-2": {"path": "c/x"}}
    lora = convert(config("task_arithmetic") | {"models": [{"model": "base+l", "parameters": {"weight": 1}}]})
    assert lora.recipe["models"] == {"l": {"path": "l"}}
    assert lora.lost == ()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (config("ties", (1.0, 2.0, 1.0)), "weights vote"),
        (config("dare_ties"), "normalize: false"),
        (config("linear", tokenizer_source="union"), "tokenizer_source: union"),
        (config("linear", chat_template="chatml"), "chat_template"),
        (config("ties", parameters={"density": [0.1, 0.9]}), "density: a value by layer"),
        (config("slerp", parameters={"t": [{"filter": "mlp", "value": 0.5}]}), "t: a value by layer"),
        (config("task_arithmetic", parameters={"shiny": 1}), "parameters.shiny"),
        (config("linear") | {"models": [{"model": "a@main", "parameters": {"weight": 1}}]}, "revision main"),
        (
            config("ties")
            | {
                "models": [{"model": m, "parameters": {"weight": 1, "density": d}} for m, d in (("a", 0.1), ("b", 0.2))]
            },
            "another value for every model",
        ),
    ],
)
def test_what_is_not_carried_over_is_named(document: dict[str, Any], words: str) -> None:
    assert any(words in item for item in convert(document).lost), convert(document).lost


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"merge_method": "passthrough", "models": ["a"]}, "'passthrough' has no counterpart"),
        ({"merge_method": "linear", "slices": [{"sources": []}]}, "slices of layers"),
        ({"merge_method": "linear", "models": ["a"]}, "a has no weight"),
        ({"models": []}, "no mergekit configuration"),
        (config("linear") | {"models": [{"model": "a", "parameters": {"weight": "heavy"}}]}, "no number"),
    ],
)
def test_what_has_no_counterpart_is_refused(document: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        convert(document)


def test_the_command_refuses_unless_partial(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config("linear", tokenizer_source="union")))
    command = [sys.executable, "-m", "modelweld", "import-mergekit", "config.yml", "-o", "recipe.yaml"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode == 2
    assert "tokenizer_source: union" in refused.stderr
    assert not (tmp_path / "recipe.yaml").exists()
    done = subprocess.run([*command, "--partial"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "# not carried over: tokenizer_source" in (tmp_path / "recipe.yaml").read_text()
    assert load_recipe(tmp_path / "recipe.yaml").method_name == "linear"
