"""The tensor inventory over real safetensors: what it measures is what numpy says, and it does so in one pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modelweld.checkpoints import Checkpoint
from modelweld.validation import inventory, measures
from modelweld.validation.checkpoints import identical_models
from modelweld.validation.inventory import Inventory, take_inventory
from tests.support.inventories import Tensors, write_model


def survey(base: Path, **experts: Path) -> tuple[Inventory, dict[str, Inventory]]:
    return take_inventory(Checkpoint.open(base), {name: Checkpoint.open(path) for name, path in experts.items()})


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tensors() -> Tensors:
    return {
        "encoder.layer.0.a.weight": random(40, 70, seed=1),
        "encoder.layer.0.a.bias": random(40, seed=2),
        "encoder.layer.0.cube": random(3, 5, 7, seed=3),
        "encoder.scale": random(seed=4),
    }


def test_figures_are_numpys(tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "CHUNK", 150)
    moved = {name: tensor + 0.1 * random(*tensor.shape, seed=9) for name, tensor in tensors.items()}
    base, found = survey(write_model(tmp_path / "base", tensors), x=write_model(tmp_path / "x", moved))
    rows = found["x"].frame.set_index("name")
    for name, tensor in tensors.items():
        before, after = tensor.double().numpy(), moved[name].double().numpy()
        assert rows.loc[name, "norm"] == pytest.approx(np.linalg.norm(after))
        expected = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert rows.loc[name, "relative_delta"] == pytest.approx(expected)
        assert rows.loc[name, "changed_share"] == 1
        assert rows.loc[name, "finite_share"] == 1
    matrices = [name for name in tensors if tensors[name].ndim >= 2]
    numerator = sum(float(((moved[name] - tensors[name]).double() ** 2).sum()) for name in matrices)
    denominator = sum(float((tensors[name].double() ** 2).sum()) for name in matrices)
    assert found["x"].relative_delta == pytest.approx((numerator / denominator) ** 0.5)
    assert base.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert base.relative_delta is None
    assert list(base.frame["shape"]) == ["40", "40×70", "3×5×7", "scalar"]


def test_rank_of_a_low_rank_delta(tmp_path: Path, tensors: Tensors) -> None:
    name = "encoder.layer.0.a.weight"
    moved = dict(tensors)
    moved[name] = tensors[name] + 0.1 * random(40, 3, seed=5) @ random(3, 70, seed=6)
    _, found = survey(write_model(tmp_path / "base", tensors), x=write_model(tmp_path / "x", moved))
    rows = found["x"].frame.set_index("name")
    assert rows.loc[name, "delta_rank"] == 3
    assert np.isnan(rows.loc["encoder.layer.0.a.bias", "delta_rank"])
    again = survey(tmp_path / "base", x=tmp_path / "x")[1]["x"].frame
    assert again.equals(found["x"].frame)


def test_threads_do_not_change_a_digit(tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {name: tensor * 1.01 for name, tensor in tensors.items()}
    paths = write_model(tmp_path / "base", tensors), write_model(tmp_path / "x", moved)
    frames = []
    for workers in (1, 4):
        monkeypatch.setattr(inventory, "WORKERS", workers)
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        frames.append(survey(paths[0], x=paths[1])[1]["x"].frame)
    assert frames[0].equals(frames[1])


def test_one_nan_is_seen_and_keeps_its_figures_out(tmp_path: Path, tensors: Tensors) -> None:
    moved = {name: tensor * 1.01 for name, tensor in tensors.items()}
    moved["encoder.layer.0.a.weight"][3, 4] = float("nan")
    moved["encoder.layer.0.cube"][0, 0, 0] = float("-inf")
    _, found = survey(write_model(tmp_path / "base", tensors), x=write_model(tmp_path / "x", moved))
    rows = found["x"].frame.set_index("name")
    assert rows.loc["encoder.layer.0.a.weight", "finite_share"] == 1 - 1 / 2800
    assert rows.loc["encoder.layer.0.cube", "finite_share"] == 1 - 1 / 105
    assert rows.loc["encoder.layer.0.a.bias", "finite_share"] == 1


def test_names_are_laid_beside_the_bases(tmp_path: Path, tensors: Tensors) -> None:
    moved = {f"bert.{name}": tensor * 1.01 for name, tensor in tensors.items()}
    del moved["bert.encoder.layer.0.cube"]
    moved["bert.encoder.layer.1.new"] = random(2, 2)
    moved["classifier.weight"] = random(3, 40)
    expert = write_model(tmp_path / "x", moved, "BertForSequenceClassification")
    _, found = survey(write_model(tmp_path / "base", tensors), x=expert)
    rows = found["x"].frame.set_index("name")
    assert rows.loc["encoder.layer.0.cube", "role"] == "missing"
    assert rows.loc["bert.encoder.layer.1.new", "role"] == "extra"
    assert rows.loc["classifier.weight", "role"] == "head"
    assert found["x"].head_shapes == ((3, 40),)
    assert found["x"].backbone is None
    assert rows.loc["bert.encoder.layer.0.a.bias", "role"] == "backbone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_base_in_another_precision_is_still_the_base(tmp_path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    same = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    _, found = survey(write_model(tmp_path / "base", tensors), x=write_model(tmp_path / "x", same))
    assert found["x"].changed_share == 0


def test_identical_models_are_told_by_values_not_by_files(tmp_path: Path, tensors: Tensors) -> None:
    moved = {name: tensor * 1.01 for name, tensor in tensors.items()}
    prefixed = {f"bert.{name}": tensor for name, tensor in moved.items()} | {"classifier.weight": random(2, 40)}
    other = {name: tensor * 1.02 for name, tensor in tensors.items()}
    _, found = survey(
        write_model(tmp_path / "base", tensors),
        one=write_model(tmp_path / "one", moved),
        two=write_model(tmp_path / "two", prefixed, "BertForSequenceClassification"),
        three=write_model(tmp_path / "three", other),
    )
    assert identical_models(found) == {"one": "two", "two": "one"}


def test_integers_and_odd_shapes_are_measured_without_complaint(tmp_path: Path) -> None:
    tensors = {
        "embeddings.position_ids": torch.arange(6).reshape(1, 6),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "wave": torch.zeros(3, dtype=torch.complex64),
        "small": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "weight": random(4, 4),
    }
    quantised = dict(tensors) | {"weight": torch.ones(4, 4, dtype=torch.int8)}
    base, found = survey(write_model(tmp_path / "base", tensors), x=write_model(tmp_path / "x", quantised))
    classes = dict(zip(base.frame["name"], base.frame["dtype_class"], strict=True))
    assert classes["mask"] == "bool"
    assert classes["small"] == "float8"
    assert classes["wave"] == "complex"
    row = found["x"].frame.set_index("name").loc["weight"]
    assert (row["dtype_class"], row["base_dtype_class"]) == ("integer", "float")
    assert np.isnan(row["relative_delta"])
