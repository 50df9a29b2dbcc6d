"""Whole merges on a real CUDA device: the engine's lanes, one process a GPU, and memory that runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelweld.config import Recipe
from modelweld.config.recipe import RECIPE_ADAPTER
from modelweld.stages.merge import merge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
SHAPES = {"embed.weight": (3000, 96), "layers.0.proj.weight": (1500, 2000), "layers.0.norm.weight": (96,)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A base and three experts."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for model in ("base", "e0", "e1", "e2"):
        noise = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text("{}")
        tensors = base if model == "base" else {name: base[name] + noise[name] for name in SHAPES}
        save_file(tensors, tmp_path / model / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def recipe(root: Path, name: str) -> Recipe:
    models = {f"e{i}": {"path": str(root / f"e{i}")} for i in range(3)}
    return RECIPE_ADAPTER.validate_python({"method": name, "base": str(root / "base"), "models": models})


@pytest.mark.parametrize("name", ["task_arithmetic", "dare", "ties", "breadcrumbs", "drm", "knots"])
def test_a_merge_on_the_device_gives_what_the_cpu_gives(root: Path, name: str) -> None:
    merge(recipe(root, name), root / "away", "cuda")
    merge(recipe(root, name), root / "here", "cpu")
    away, here = (load_file(root / out / "model.safetensors") for out in ("away", "here"))
    for tensor, values in here.items():
        torch.testing.assert_close(away[tensor], values, rtol=1e-5, atol=1e-6)


def test_the_bytes_do_not_depend_on_the_number_of_processes(root: Path) -> None:
    merge(recipe(root, "drm"), root / "one", "cuda:0")
    merge(recipe(root, "drm"), root / "two", f"cuda:0,cuda:{torch.cuda.device_count() - 1}")
    for file in (root / "one").iterdir():
        assert file.read_bytes() == (root / "two" / file.name).read_bytes()


def test_a_matrix_that_does_not_fit_is_merged_on_the_cpu(root: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((64 << 20) / total)
    try:
        report = merge(recipe(root, "drm"), root / "out", "cuda", threads=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("merged on the CPU" in note for note in report.notes)
