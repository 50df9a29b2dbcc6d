"""The way to a device and back, as far as it goes without one: streams that copy, and memory that runs out.

`Moving` sends to the CPU what a real stream sends to a GPU, through the same buffers and in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modelweld.config.methods import TaskArithmetic
from modelweld.engine import build, open_inputs
from modelweld.engine.cost.memory import working_bytes
from modelweld.engine.run import chunks, worker
from modelweld.engine.run.chunks import on_device
from modelweld.engine.run.device_stream import LEAST, DeviceStream
from modelweld.errors import ExternalError
from modelweld.lineage import manifest
from modelweld.methods.method import Method, TensorContext
from modelweld.methods.registry import method
from modelweld.stages.grid import merge_grid
from modelweld.stages.merge import merge
from tests.support.families import recipe, weights_of, write_family

CPU = torch.device("cpu")
SHAPES = {
    "model.embed_tokens.weight": (300, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 200),
    "model.norm.weight": (64,),
}
LARGE = "model.embed_tokens.weight"
MATRIX = "model.layers.0.mlp.down_proj.weight"


class Moving(DeviceStream):
    """A stream that copies although its device is the host, and counts what is under way."""

    most = 0
    chunk = 4096

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.kind, self.block = "elsewhere", self.chunk
        self._flying = 0

    def synchronize(self) -> None:
        Moving.most = max(Moving.most, self._flying)
        self._flying -= 1

    def submit(self) -> Any:
        self._flying += 1
        return super().submit()


def move(patch: pytest.MonkeyPatch, chunk: int) -> None:
    """Let every worker's stream copy, in chunks of so many elements."""
    patch.setattr(worker, "DeviceStream", Moving)
    patch.setattr(worker, "DEVICE_CHUNK", chunk)
    patch.setattr(Moving, "chunk", chunk)
    patch.setattr(Moving, "most", 0)


@pytest.mark.parametrize(
    "name", ["task_arithmetic", "dare", "linear", "ties", "breadcrumbs", "drm", "tsv_m", "least_interference"]
)
def test_what_goes_to_a_device_comes_back_as_if_it_had_stayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = write_family(tmp_path, SHAPES, dtype=torch.bfloat16)
    move(monkeypatch, 4096)
    merge(recipe(root, name), tmp_path / "away", threads=1)
    assert Moving.most == 1 + method(name).elementwise, "one chunk is computed while the next is read"
    monkeypatch.undo()
    merge(recipe(root, name), tmp_path / "here", threads=1)
    for tensor, values in weights_of(tmp_path / "here").items():
        assert torch.equal(weights_of(tmp_path / "away")[tensor], values), tensor
    away, here = (manifest.read(tmp_path / out).data()["tensors"] for out in ("away", "here"))
    for key in ("rank", "kept_share", "sign_conflicts", "direction"):
        assert {n: entry.get(key) for n, entry in away.items()} == {n: entry.get(key) for n, entry in here.items()}


def short_of_memory(name: str, fits: Callable[[torch.Tensor], bool]) -> Method[Any]:
    """The method on a device that has no room for what does not fit."""
    real = method(name)

    @functools.wraps(real.function)  # its keywords say what it is given
    def function(deltas: torch.Tensor, **given: Any) -> torch.Tensor:
        if not fits(deltas):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real.function(deltas, **given)

    return dataclasses.replace(real, function=function)


def test_chunks_are_halved_until_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_family(tmp_path, {LARGE: (700, 64)})
    double = short_of_memory("dare", lambda deltas: deltas.shape[1] <= 2 * LEAST)
    monkeypatch.setattr(chunks, "method", lambda name: double)
    move(monkeypatch, 8 * LEAST)
    report = merge(recipe(root, "dare"), tmp_path / "short", threads=1)
    assert any("merged in smaller blocks" in note for note in report.notes)
    monkeypatch.undo()
    merge(recipe(root, "dare"), tmp_path / "ample", threads=1)
    assert torch.equal(weights_of(tmp_path / "short")[LARGE], weights_of(tmp_path / "ample")[LARGE])
    recorded = manifest.read(tmp_path / "short").data()["tensors"][LARGE]
    assert "device" not in recorded, "smaller blocks change no byte, so they are no part of what the merge is"


def test_a_device_without_any_room_is_an_error_that_says_so() -> None:
    double = short_of_memory("task_arithmetic", lambda deltas: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "method", lambda name: double)
        context = TensorContext("layer.weight", (), ("a", "b"), finite=True)
        combine = on_device(TaskArithmetic(), [1.0, 1.0], context, DeviceStream(CPU))
    with pytest.raises(ExternalError, match=f"out of memory with {LEAST} elements at once") as caught:
        combine(torch.ones(2, 5 * LEAST), torch.ones(5 * LEAST), 0)
    assert caught.value.hint is not None
    assert "--device cpu" in caught.value.hint


def test_a_matrix_that_does_not_fit_is_merged_on_the_cpu_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_family(tmp_path, SHAPES)
    refused = []

    def fits(deltas: torch.Tensor) -> bool:
        if deltas.shape[-1] == 200 and not refused:
            refused.append(deltas)
            return False
        return True

    double = short_of_memory("drm", fits)
    monkeypatch.setattr(worker, "method", lambda name: double if name == "drm" else method(name))
    report = merge(recipe(root, "drm"), tmp_path / "short", threads=1)
    monkeypatch.undo()
    assert refused
    assert report.notes == (f"the device's memory ran out: 1 tensors were merged on the CPU, first {MATRIX}",)
    merge(recipe(root, "drm"), tmp_path / "ample", threads=1)
    assert torch.equal(weights_of(tmp_path / "short")[MATRIX], weights_of(tmp_path / "ample")[MATRIX])
    recorded = manifest.read(tmp_path / "short").data()["tensors"]
    assert [name for name, entry in recorded.items() if entry.get("device") == "cpu"] == [MATRIX]


def test_a_grid_does_not_try_the_device_again_for_a_matrix_that_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_family(tmp_path, {MATRIX: (64, 200)})
    calls = []

    def fits(deltas: torch.Tensor) -> bool:
        calls.append(deltas)
        return len(calls) > 1

    double = short_of_memory("drm", fits)
    monkeypatch.setattr(worker, "method", lambda name: double if name == "drm" else method(name))
    reports = merge_grid(recipe(root, "drm"), {"drop_rate": [0.5, 0.7, 0.9]}, tmp_path / "out", threads=1)
    assert len(calls) == 4
    assert all("merged on the CPU" in report.notes[0] for report in reports.values())


def test_what_a_device_takes_is_counted_before_it_is_sent(tmp_path: Path) -> None:
    root = write_family(tmp_path, {LARGE: (3000, 1000), "model.norm.weight": (64,)})
    with open_inputs(recipe(root, "ties")) as inputs:
        tensors = {tensor.name: tensor for tensor in build(recipe(root, "ties"), inputs).tensors}
    stack = 3 * tensors[LARGE].elements * 4
    assert working_bytes(tensors[LARGE], 3) < stack, "streamed in host memory"
    assert working_bytes(tensors[LARGE], 3, "cuda") > stack, "whole on an accelerator"
