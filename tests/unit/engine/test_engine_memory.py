"""What tensors in work may take together: two whole matrices side by side, one where a limit says so."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from modelweld.config.methods import Drm
from modelweld.engine import build, open_inputs
from modelweld.engine.cost import memory
from modelweld.methods import drm
from modelweld.stages.merge import merge
from tests.support.families import recipe, write_family

SHAPES = {f"model.layers.{layer}.self_attn.q_proj.weight": (64, 64) for layer in range(4)}


def test_two_matrices_are_in_work_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_family(tmp_path, SHAPES)
    factorise, together = drm.factorise, threading.Barrier(2, timeout=60)

    def met(deltas: torch.Tensor, **how: Any) -> drm.DrmBasis:
        if deltas.shape[1:] == (64, 64):
            together.wait()
        return factorise(deltas, **how)

    monkeypatch.setattr(memory, "SLACK", 0)
    monkeypatch.setattr(drm, "factorise", met)
    assert merge(recipe(root, "drm"), tmp_path / "out", threads=2).merged == len(SHAPES)


def test_a_limit_for_one_matrix_has_them_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_family(tmp_path, SHAPES)
    factorise, inside, most = drm.factorise, [0], [0]
    lock = threading.Lock()

    def counted(deltas: torch.Tensor, **how: Any) -> drm.DrmBasis:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        try:
            return factorise(deltas, **how)
        finally:
            with lock:
                inside[0] -= 1

    with open_inputs(recipe(root, "drm")) as inputs:
        need = max(memory.working_bytes(tensor, 3) for tensor in build(recipe(root, "drm"), inputs).tensors)
    monkeypatch.setattr(drm, "factorise", counted)
    merge(recipe(root, "drm"), tmp_path / "out", threads=4, memory_limit=need)
    assert most[0] == 1


def test_drm_needs_what_its_direction_needs(tmp_path: Path) -> None:
    root = write_family(tmp_path, {"model.layers.0.mlp.down_proj.weight": (64, 512)})
    needs = {}
    for direction in ("horizontal", "vertical", "auto"):
        asked = recipe(root, "drm", direction=direction)
        with open_inputs(asked) as inputs:
            (tensor,) = build(asked, inputs).tensors
        assert isinstance(tensor.parameters, Drm)
        needs[direction] = memory.working_bytes(tensor, 3)
    assert needs["auto"] == needs["horizontal"] < needs["vertical"]
