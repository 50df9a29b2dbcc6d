"""A merge never writes NaN or infinite values, and copies tensors that hold no numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from modelweld.errors import MergeError
from modelweld.methods.method import TensorContext
from modelweld.methods.registry import method, methods
from modelweld.stages.merge import merge
from tests.support.families import recipe, save, weights_of, write_family

EMPTY = {"layers.0.weight": (8, 8), "layers.0.bias": (8,), "placeholder.weight": (0, 8), "placeholder.bias": (0,)}


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_tensor_without_numbers_is_copied_whatever_the_method(tmp_path: Path, name: str) -> None:
    if name == "mudsc":
        pytest.skip("aligned merges need a model that transformers builds; they share this decision")
    experts = method(name).models[1] or 3
    root = write_family(tmp_path, EMPTY, experts=experts)
    rules = [{"match": {"name": "placeholder.weight"}, "use": {"method": "ties"}}]
    report = merge(recipe(root, name, experts=experts, rules=rules), tmp_path / "out")
    assert report.copied == 2
    found = weights_of(tmp_path / "out")
    assert found["placeholder.weight"].shape == (0, 8)
    assert found["placeholder.bias"].shape == (0,)
    entry = json.loads((tmp_path / "out" / "manifest.json").read_text())["tensors"]["placeholder.weight"]
    assert (entry["action"], entry["reason"]) == ("copy", "it holds no numbers")


@pytest.mark.parametrize("name", ["slerp", "linear"])
def test_weights_that_cancel_are_refused_before_a_weight_is_read(tmp_path: Path, name: str) -> None:
    root = write_family(tmp_path, experts=2)
    with pytest.raises(MergeError, match=r"sum to zero \(1.0, -1.0\)"):
        merge(recipe(root, name, experts=2, weights=[1.0, -1.0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_slerp_with_t_needs_no_weights(tmp_path: Path) -> None:
    root = write_family(tmp_path, experts=2)
    merge(recipe(root, "slerp", experts=2, weights=[1.0, -1.0], t=0.5), tmp_path / "out")
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(tmp_path / "out").values())


@pytest.mark.parametrize("name", sorted(methods()))
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_no_method_takes_a_weight_or_a_scale_that_is_not_finite(name: str, number: float) -> None:
    chosen = method(name)
    count = chosen.models[1] or 3
    stack = torch.ones(count, 4, 4)
    context = TensorContext("w", ("1", "2", "3")[:count])
    with pytest.raises(MergeError, match=rf"the weights are {number}"):
        chosen.merge(stack, chosen.parameters(), [number] + [1.0] * (count - 1), context=context)
    scaled = chosen.parameters.model_construct(**chosen.parameters().model_dump() | {"scale": number})
    with pytest.raises(MergeError, match=f"scale is {number}"):
        chosen.merge(stack, scaled, [1.0] * count, context=context)


@pytest.mark.parametrize(
    ("name", "scale", "dtype", "hint"),
    [
        ("task_arithmetic", 1e39, "float32", "smaller scale"),
        ("task_arithmetic", 1e7, "float16", "dtype: float32"),
        ("drm", 1e39, "bfloat16", "dtype: float32"),
    ],
)
def test_a_result_that_overflows_is_refused(tmp_path: Path, name: str, scale: float, dtype: str, hint: str) -> None:
    root = write_family(tmp_path)
    asked = recipe(root, name, scale=scale, output={"dtype": dtype})
    with pytest.raises(MergeError, match=f"the merge overflows {dtype}") as raised:
        merge(asked, tmp_path / "out")
    assert hint in str(raised.value.hint)
    assert not (tmp_path / "out").exists()


def test_the_largest_number_of_a_dtype_is_no_overflow(tmp_path: Path) -> None:
    largest = torch.finfo(torch.bfloat16).max
    for name in ("base", "e0", "e1"):
        # Rounds down to the largest bfloat16, although it is larger.
        save(tmp_path / name, {"w": torch.full((4, 4), largest * (1 + 2.0**-10))}, {"model_type": "bert"})
    merge(recipe(tmp_path, "ties", experts=2, output={"dtype": "bfloat16"}), tmp_path / "out")
    assert bool((weights_of(tmp_path / "out")["w"] == largest).all())
