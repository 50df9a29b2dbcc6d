"""Plots of an alignment show what they were given, and are the same file for the same figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from modelweld.reporting.alignment import identity_by_layer, plot_alpha, plot_identity, plot_similarity
from modelweld.reporting.landscape import plot_landscape


def ink(path: Path) -> float:
    """The share of pixels that are not white."""
    return float((imread(path)[..., :3] < 0.99).any(axis=-1).mean())


def test_groups_are_gathered_by_layer_in_their_order() -> None:
    shares = {
        "vit.embeddings.projection.weight[0]": 1.0,
        "vit.layers.0.attention.q_proj.weight[0.0]": 0.5,
        "vit.layers.0.mlp.fc1.weight[0]": 0.25,
        "vit.layers.10.mlp.fc1.weight[0]": 0.0,
    }
    assert identity_by_layer(shares) == {"projection": 1.0, "0": 0.375, "10": 0.0}


def test_a_pipeline_of_stages_keeps_its_layers_apart() -> None:
    shares = {
        f"resnet.encoder.stages.{s}.layers.{b}.layer.0.convolution.weight[0]": 1.0 for s in (0, 1) for b in (0, 1)
    }
    assert list(identity_by_layer(shares)) == ["0.0.0", "0.1.0", "1.0.0", "1.1.0"]


def test_the_best_alpha_is_ringed_and_equal_curves_give_equal_files(tmp_path: Path) -> None:
    curves = {"align": {0.1: 0.4, 0.5: 0.6, 1.0: 0.3}, "zip": {0.1: 0.5, 0.5: 0.5, 1.0: 0.7}}
    first, second = plot_alpha(curves, tmp_path / "a.png"), plot_alpha(curves, tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes()
    assert plot_alpha({"align": curves["align"]}, tmp_path / "c.png").read_bytes() != first.read_bytes()


def test_more_units_in_place_is_more_ink(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.fc1.weight[0]" for layer in range(12)]
    moved = plot_identity(dict.fromkeys(names, 0.05), tmp_path / "moved.png")
    still = plot_identity(dict.fromkeys(names, 1.0), tmp_path / "still.png")
    assert ink(still) > ink(moved) + 0.2


def test_the_heat_map_tells_before_from_after(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(20)
    before, after = np.eye(20)[order], np.eye(20)
    drawn = plot_similarity(before, after, "layers.0", tmp_path / "one.png")
    assert drawn.read_bytes() != plot_similarity(after, after, "layers.0", tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("tasks", [["first"], ["first", "second", "third"]])
def test_a_landscape_has_a_panel_a_task(tmp_path: Path, tasks: list[str]) -> None:
    steps = np.linspace(-1, 2, 5)
    hill = np.exp(-(steps[:, None] ** 2 + steps[None] ** 2))
    plane = {
        "x": steps.tolist(),
        "y": steps.tolist(),
        "tasks": [hill.tolist()] * len(tasks),
        "points": {"expert 1": (0.0, 0.0), "expert 2": (1.0, 0.0), "merge": (0.5, 1.0)},
    }
    path = plot_landscape(plane, tasks, tmp_path / "new" / "landscape.png")
    assert imread(path).shape[1] > 600 * len(tasks)
    assert ink(path) > 0.3


def test_a_landscape_without_a_panel_for_each_task_is_an_error(tmp_path: Path) -> None:
    plane = {"x": [0, 1], "y": [0, 1], "tasks": [[[0, 1], [1, 0]]], "points": {}}
    with pytest.raises(ValueError, match="shorter"):
        plot_landscape(plane, ["first", "second"], tmp_path / "x.png")
