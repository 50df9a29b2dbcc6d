"""What is measured of an adapter in its factors is what is measured of the model that it folds into."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modelweld.checkpoints import Checkpoint
from modelweld.checkpoints.adapter import Adapter
from modelweld.checkpoints.folding import Folded
from modelweld.checkpoints.rounding import folded_rank
from modelweld.validation.adapters import other_base
from modelweld.validation.checkpoints import identical_models
from modelweld.validation.inventory import take_inventory
from tests.support.inventories import write_model
from tests.support.lora import QUERY, bert, llama, write_adapter, write_classifier

pytest.importorskip("peft")


def test_an_adapters_figures_are_those_of_the_folded_model(tmp_path: Path) -> None:
    root = bert(tmp_path)
    write_classifier(root, "e0", 1, bias="all", modules_to_save=["pooler"], rank_pattern={"query": 3}, use_rslora=True)
    with Folded.onto(root / "base", root / "e0") as folded:
        whole = write_model(
            tmp_path / "whole", {n: folded.read(n) for n in folded.tensors}, "BertForSequenceClassification"
        )
    with Checkpoint.open(root / "base") as base, Checkpoint.open(whole) as dense:
        adapter = Adapter.open(root / "e0", base, "e0")
        _, found = take_inventory(base, {"adapter": adapter, "dense": dense})
        adapter.checkpoint.close()
    factors, plain = found["adapter"], found["dense"]
    assert factors.relative_delta == pytest.approx(plain.relative_delta, rel=1e-5)
    assert factors.changed_share == pytest.approx(plain.changed_share, abs=0.01)
    assert factors.head_shapes == plain.head_shapes == ((3,), (3, 16))
    rows, expected = factors.frame.set_index("name"), plain.frame.set_index("name")
    query = "encoder.layer.0.attention.self.query.weight"
    for column in ("delta_norm", "relative_delta", "matrix_delta"):
        assert rows.loc[query, column] == pytest.approx(expected.loc[f"bert.{query}", column], rel=1e-4)
    assert rows.loc[query, "delta_rank"] == expected.loc[f"bert.{query}", "delta_rank"] == 3
    assert math.isnan(rows.loc[query, "norm"])
    # What it stores whole is measured as in any model; what it leaves alone has no row.
    stored = [name for name in rows.index if name.endswith("pooler.dense.weight")]
    assert rows.loc[stored[0], "norm"] == pytest.approx(expected.loc["bert.pooler.dense.weight", "norm"])
    assert not any("embeddings" in name and name.endswith("weight") for name in rows.index)
    assert set(rows["role"]) == {"backbone", "head"}


def test_values_that_are_not_finite_and_adapters_that_were_never_trained(tmp_path: Path) -> None:
    root = llama(tmp_path)
    write_adapter(root / "base", root / "e0", 1)
    write_adapter(root / "base", root / "e1", 1)
    file = root / "e0" / "adapter_model.safetensors"
    values = load_file(file)
    spoilt = next(name for name in values if "layers.0" in name and "q_proj.lora_A" in name)
    values[spoilt][0, 0] = float("nan")
    save_file(values, file)
    file = root / "e1" / "adapter_model.safetensors"
    save_file({n: torch.zeros_like(v) if "lora_B" in n else v for n, v in load_file(file).items()}, file)
    with Checkpoint.open(root / "base") as base:
        adapters = {name: Adapter.open(root / name, base, name) for name in ("e0", "e1")}
        _, found = take_inventory(base, adapters)
        for adapter in adapters.values():
            adapter.checkpoint.close()
    rows = found["e0"].frame.set_index("name")
    assert rows.loc[QUERY, "finite_share"] == 1 - 1 / 64
    assert np.isnan(rows.loc[QUERY, "delta_norm"])
    assert (rows.drop(QUERY)["finite_share"] == 1).all()
    assert found["e0"].relative_delta is not None
    assert found["e1"].changed_share == 0
    assert found["e1"].relative_delta == 0


def test_adapters_with_the_same_factors_are_identical(tmp_path: Path) -> None:
    root = llama(tmp_path)
    for name, seed in (("e0", 1), ("e1", 1), ("e2", 2)):
        write_adapter(root / "base", root / name, seed)
    # PEFT draws A itself: the copy is made equal by hand.
    (root / "e1" / "adapter_model.safetensors").write_bytes((root / "e0" / "adapter_model.safetensors").read_bytes())
    with Checkpoint.open(root / "base") as base:
        adapters = {name: Adapter.open(root / name, base, name) for name in ("e0", "e1", "e2")}
        _, found = take_inventory(base, adapters)
    assert identical_models(found) == {"e0": "e1", "e1": "e0"}


@pytest.mark.parametrize(
    ("stated", "addresses", "found"),
    [
        ("org/name", ["hf://org/name@main"], None),
        ("/home/ada/models/Base/", ["s3://bucket/models/base"], None),
        ("C:\\models\\base", ["models/base"], None),
        ("org/other", ["hf://org/name@main", "dvc://zoo@v1:models/base"], "org/other"),
        ("zoo/base", ["dvc://zoo@v1:models/base"], None),
        ("", ["hf://org/name@main"], None),
        (None, ["hf://org/name@main"], None),
    ],
)
def test_another_base_is_told_by_its_name(stated: str | None, addresses: list[str], found: str | None) -> None:
    assert other_base(stated, addresses) == found


def halves(delta: torch.Tensor, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """A base of four weights and it plus `delta`, both rounded."""
    generator = torch.Generator().manual_seed(3)
    names = [f"layer.{number}.weight" for number in range(4)]
    before = {name: (0.03 * torch.randn(delta.shape, generator=generator)).to(dtype) for name in names}
    after = {name: (tensor.float() + delta).to(dtype) for name, tensor in before.items()}
    before["norm.weight"] = after["norm.weight"] = torch.ones(delta.shape[1], dtype=dtype)
    return write_model(folder / "base", before), write_model(folder / "expert", after)


def rank_found(paths: tuple[Path, Path]) -> int | None:
    with Checkpoint.open(paths[0]) as base, Checkpoint.open(paths[1]) as expert:
        return folded_rank(base, expert, {name: name for name in base.tensors})


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [4, 16])
def test_an_adapter_folded_into_half_precision_is_told_with_its_rank(
    tmp_path: Path, rank: int, dtype: torch.dtype
) -> None:
    delta = (normal(192, rank, seed=1) * torch.logspace(0, -1, rank)) @ normal(rank, 320, seed=2)
    delta *= 0.001 / delta.square().mean().sqrt()
    assert rank_found(halves(delta, tmp_path, dtype)) == rank


@pytest.mark.parametrize("slope", [0.0, 0.7, 1.2, 2.0])
@pytest.mark.parametrize("size", [3e-5, 3e-4, 3e-3])
def test_a_full_finetune_is_not_taken_for_an_adapter(tmp_path: Path, slope: float, size: float) -> None:
    left, singular, right = torch.linalg.svd(normal(192, 320, seed=1), full_matrices=False)
    delta = (left * torch.arange(1.0, len(singular) + 1) ** -slope) @ right
    delta *= size / delta.square().mean().sqrt()
    assert rank_found(halves(delta, tmp_path)) is None


def test_full_precision_and_equal_models_are_left_alone(tmp_path: Path) -> None:
    delta = 1e-3 * normal(192, 4, seed=1) @ normal(4, 320, seed=2)
    assert rank_found(halves(delta, tmp_path / "float32", torch.float32)) is None
    assert rank_found(halves(torch.zeros(192, 320), tmp_path / "equal")) is None
    assert rank_found(halves(torch.full((192, 320), torch.nan), tmp_path / "spoilt")) is None
