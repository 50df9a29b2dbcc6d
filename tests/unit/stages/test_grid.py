"""Grids: every candidate is what a merge of its own would have written, and the work they share is done once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from modelweld.checkpoints import Checkpoint
from modelweld.errors import ConfigError
from modelweld.methods import drm
from modelweld.stages.grid import candidates, merge_grid
from modelweld.stages.merge import merge
from tests.support.families import LLAMA_SHAPES, recipe, tree_bytes, write_family
from tests.support.progress import Stop, Stopper

GRIDS: list[tuple[str, dict[str, list[Any]]]] = [
    ("drm", {"drop_rate": [0.0, 0.5, 0.9], "scale": [1.0, 0.5]}),
    ("drm", {"direction": ["horizontal", "vertical"], "disjoint_mean": [True, False]}),
    ("ties", {"density": [0.2, 0.7]}),
    ("dare", {"drop_rate": [0.3, 0.6], "combine": ["linear", "ties"]}),
    ("della", {"drop_rate": [0.3, 0.6]}),
    ("breadcrumbs", {"density": [0.5, 0.8]}),
    ("knots", {"density": [0.3, 0.9]}),
    ("tsv_m", {"rank_share": [None, 0.5], "spectrum_power": [0.0, 1.0]}),
    ("least_interference", {"side": ["input", "both"], "ridge": [None, 0.1]}),
    ("pcb", {"density": [0.1, 0.5]}),
]


@pytest.mark.parametrize(("method", "grid"), GRIDS, ids=[f"{m}-{'-'.join(g)}" for m, g in GRIDS])
def test_candidates_are_the_bytes_of_separate_merges(tmp_path: Path, method: str, grid: dict[str, list[Any]]) -> None:
    root = write_family(tmp_path, dtype=torch.bfloat16)
    asked = recipe(root, method, weights=[1.0, 2.0, 0.5])
    reports = merge_grid(asked, grid, root / "grid", threads=2)
    wanted = candidates(asked, grid)
    assert sorted(path.name for path in (root / "grid").iterdir()) == sorted(wanted) == sorted(reports)
    for key, candidate in wanted.items():
        alone = merge(candidate, root / "alone")
        assert tree_bytes(root / "grid" / key) == tree_bytes(root / "alone"), key
        assert reports[key].manifest_digest == alone.manifest_digest
    assert len({report.model_digest for report in reports.values()}) == len(reports)


def test_a_weight_is_read_and_factorised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_family(tmp_path)
    read: Counter[str] = Counter()
    factorised: list[torch.Size] = []
    reading, factorising = Checkpoint.read_into, drm.factorise

    def counted(self: Checkpoint, name: str, start: int, buffer: memoryview) -> None:
        read[f"{self.path.name}:{name}:{start}"] += 1
        reading(self, name, start, buffer)

    def recorded(deltas: torch.Tensor, **how: Any) -> drm.DrmBasis:
        factorised.append(deltas.shape)
        return factorising(deltas, **how)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    monkeypatch.setattr(drm, "factorise", recorded)
    merge_grid(recipe(root, "drm"), {"drop_rate": [0.1, 0.4, 0.6, 0.8]}, root / "grid")
    matrices = [name for name in LLAMA_SHAPES if "proj" in name]
    assert all(read[f"{model}:{name}:0"] == 1 for model in ("base", "e0", "e1", "e2") for name in matrices)
    # One more was tried on ones while planning each candidate.
    assert len([shape for shape in factorised if shape[1] > 2]) == len(matrices)


def test_an_interrupted_grid_goes_on(tmp_path: Path) -> None:
    root = write_family(tmp_path)

    grid = {"drop_rate": [0.5, 0.8]}
    with pytest.raises(Stop):
        merge_grid(
            recipe(root, "drm"), grid, root / "grid", threads=1, progress=Stopper("model.layers.1.mlp.down_proj.weight")
        )
    assert not [path for path in (root / "grid").iterdir() if not path.name.startswith(".")]
    reports = merge_grid(recipe(root, "drm"), grid, root / "grid")
    assert all(report.resumed > 0 for report in reports.values())
    merge(recipe(root, "drm", drop_rate=0.8), root / "alone")
    assert tree_bytes(root / "grid" / "drop_rate=0.8") == tree_bytes(root / "alone")


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"drop_rat": [0.5]}, "drm has no parameter 'drop_rat'"),
        ({"drop_rate": [0.5, 1.5]}, "drop_rate=1.5: drop_rate: Input should be less than 1, not 1.5"),
        ({"drop_rate": [0.5, 0.5]}, "one twice"),
        ({"drop_rate": []}, "no values"),
        ({}, "no axis"),
    ],
)
def test_a_grid_that_says_nothing_sensible_is_refused(tmp_path: Path, grid: dict[str, list[Any]], words: str) -> None:
    root = write_family(tmp_path)
    with pytest.raises(ConfigError, match=words):
        merge_grid(recipe(root, "drm"), grid, root / "grid")
    assert not (root / "grid").exists()


def test_the_command_writes_candidates(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    models = {f"e{i}": {"path": f"e{i}"} for i in range(3)}
    (root / "recipe.yaml").write_text(json.dumps({"method": "drm", "base": "base", "models": models}))
    command = [sys.executable, "-m", "modelweld", "merge", "recipe.yaml", "grid", "--json"]
    axes = ["--grid", "drop_rate=0.5,0.8", "--grid", "direction=vertical"]
    done = subprocess.run([*command, *axes], cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {f"drop_rate={p}_direction=vertical" for p in (0.5, 0.8)}
    bad = subprocess.run([*command, "--grid", "drop_rate"], cwd=root, capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "drop_rate=0.5,0.8" in bad.stderr
