"""Aligned merges of image models: calibration by images, alpha on image tasks, batch statistics computed anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from modelweld.checkpoints.loading import load
from modelweld.errors import ConfigError, InputError, MergeError
from modelweld.lineage import manifest
from modelweld.stages.merge import MergeReport, merge
from tests.support.pictures import png, train

TASKS = {"low": ("0", "1", "2"), "high": ("7", "8", "9")}
STATISTIC = "embedder.embedder.normalization.running_mean"
Weld = Callable[..., MergeReport]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny ResNets with BatchNorm, each from its own initialisation and for its own three digits."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    pixels = (data.images * 255 / 16).round().astype(np.uint8)
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.3], image_std=[0.35])
    for number, (task, names) in enumerate(TASKS.items()):
        chosen = np.flatnonzero(np.isin(data.target, [int(name) for name in names]))
        labels = data.target[chosen]
        (root / task).mkdir()
        for split, part in {"train": slice(0, 300), "validation": slice(300, 380), "test": slice(380, None)}.items():
            pd.DataFrame(
                {"image": [png(pixels[row]) for row in chosen[part]], "label": [str(one) for one in labels[part]]}
            ).to_parquet(root / task / f"{split}.parquet", index=False)
        torch.manual_seed(number)
        model = ResNetForImageClassification(
            ResNetConfig(
                num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=8,
                id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
            )
        )  # fmt: skip
        inputs = (torch.from_numpy(pixels[chosen[:300]]).float().unsqueeze(1) / 255 - 0.3) / 0.35
        train(model, inputs, torch.tensor([names.index(str(one)) for one in labels[:300]]), epochs=8)
        model.save_pretrained(root / "models" / task)
        processor.save_pretrained(root / "models" / task)
    return root


@pytest.fixture
def weld(digits: Path, tmp_path: Path) -> Weld:
    def run(
        name: str = "merged", method: str = "mudsc", weight: float = 1.0, dtype: str = "auto", **align: Any
    ) -> MergeReport:
        models: dict[str, dict[str, Any]] = {task: {"path": str(digits / "models" / task)} for task in TASKS}
        models["low"]["weight"] = weight
        file = tmp_path / f"{name}.yaml"
        document = {"method": method, "models": models, "align": align, "output": {"dtype": dtype}}
        file.write_text(yaml.safe_dump(document, sort_keys=False))
        return merge(file, tmp_path / name, "cpu", root=digits, staging=tmp_path / "staging")

    return run


def rows(digits: Path, split: str = "train") -> dict[str, Any]:
    return {task: {"dataset": str(digits / task), "split": split, "image": "image"} for task in TASKS}


def accuracy(merged: Path, digits: Path) -> float:
    """The mean over both tasks of the share of test images that are right."""
    from modelweld.evaluation.images import image_logits, preprocessing, read_images
    from modelweld.evaluation.settings import Settings

    right = []
    for task, names in TASKS.items():
        test = read_images(str(digits / task), "test", "image", "label")
        how = Settings(1, 1, "cpu")
        logits = image_logits(load(merged, task), preprocessing(merged), test.images, how, lambda _: None, task)
        right.append(float((logits.argmax(axis=1) == [names.index(str(one)) for one in test.labels]).mean()))
    return sum(right) / len(right)


def test_statistics_are_those_of_the_merge_on_the_calibration_images(digits: Path, weld: Weld, tmp_path: Path) -> None:
    report = weld(calibration=rows(digits), rows=200)
    merged = tmp_path / "merged"
    document = manifest.read(merged).data()
    assert document["repair"]["rows"] == 200
    assert document["repair"]["digest"] == document["alignment"]["calibration"]["digest"]
    assert document["repair"]["layers"] == len([name for name in document["tensors"] if name.endswith("running_mean")])
    assert manifest.verify(merged) == []
    assert not any("batch statistics" in note for note in report.notes)
    # The first layer sees the images themselves: its new mean is that of its outputs on them, and not the parents'.
    weld("stale", calibration=rows(digits), rows=200, repair=False)
    new, old = load_file(merged / "model.safetensors"), load_file(tmp_path / "stale" / "model.safetensors")
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed == {name for name in new if name.endswith(("running_mean", "running_var"))}
    assert accuracy(merged, digits) > accuracy(tmp_path / "stale", digits)


def test_equal_merges_have_equal_bytes_whatever_the_threads(digits: Path, weld: Weld, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads, name in ((1, "one"), (2, "two")):
            torch.set_num_threads(threads)
            weld(name, calibration=rows(digits), rows=64)
    finally:
        torch.set_num_threads(before)
    for file in ("model.safetensors", "manifest.json", "alignment.json", "alignment.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_half_precision_is_repaired_in_single_and_stored_in_half(digits: Path, weld: Weld, tmp_path: Path) -> None:
    for name, dtype in (("half", "bfloat16"), ("single", "float32")):
        weld(name, dtype=dtype, calibration=rows(digits), rows=64)
    half, single = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "single"))
    name = f"resnet.{STATISTIC}"
    assert half[name].dtype == torch.bfloat16
    torch.testing.assert_close(half[name].float(), single[name], rtol=0.02, atol=0.02)
    assert manifest.verify(tmp_path / "half") == []


def test_an_unaligned_merge_is_repaired_too(digits: Path, weld: Weld, tmp_path: Path) -> None:
    weld(method="average", mode="none", calibration=rows(digits), rows=64)
    document = manifest.read(tmp_path / "merged").data()
    assert document["repair"]["layers"] > 1
    assert document["alignment"]["identity_share"] == 1.0
    assert not document["alignment"]["aligned_already"]
    experts = [load_file(digits / "models" / task / "model.safetensors") for task in TASKS]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "resnet.embedder.embedder.convolution.weight"
    torch.testing.assert_close(merged[name], (experts[0][name] + experts[1][name]) / 2)


def test_statistics_that_are_not_repaired_are_weighted_like_the_weights(
    digits: Path, weld: Weld, tmp_path: Path
) -> None:
    weld(method="linear", weight=3.0, mode="none")
    experts = [load_file(digits / "models" / task / "model.safetensors") for task in TASKS]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = f"resnet.{STATISTIC}"
    torch.testing.assert_close(merged[name], (3 * experts[0][name] + experts[1][name]) / 4)


def test_alpha_is_chosen_on_images(digits: Path, weld: Weld, tmp_path: Path) -> None:
    weld(
        calibration=rows(digits), rows=64, alpha="auto", grid=[0.0, 0.5, 1.0], validation=rows(digits, "validation"),
        validation_rows=60,
    )  # fmt: skip
    document = json.loads((tmp_path / "merged" / "alignment.json").read_text())
    curve = document["alpha_curve"]
    assert list(curve) == ["0", "0.5", "1"]
    assert curve[f"{document['alpha']:g}"] == max(curve.values())
    assert document["alpha_scored_by"] == "mudsc"


def test_rows_that_do_not_do_are_refused(digits: Path, weld: Weld, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="8 calibration rows are too few"):
        weld(calibration=rows(digits), rows=8)
    with pytest.raises(ConfigError, match="repair: true needs rows"):
        weld(repair=True)
    with pytest.raises(ConfigError, match="no column 'picture'"):
        weld(calibration={"low": {"dataset": str(digits / "low"), "image": "picture"}})
    with pytest.raises(ConfigError, match="texts and rows of images"):
        weld(calibration=rows(digits) | {"more": {"dataset": str(digits / "low"), "text": "label"}})
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        weld(calibration={"low": {"dataset": str(digits / "low"), "text": "label"}})
    folder = tmp_path / "empty"
    folder.mkdir()
    pd.read_parquet(digits / "low" / "train.parquet").head(0).to_parquet(folder / "train.parquet", index=False)
    with pytest.raises(InputError, match="no rows"):
        weld(calibration={"low": {"dataset": str(folder), "image": "image"}})
    assert not (tmp_path / "merged").exists()


def test_a_merge_interrupted_after_its_repair_goes_on_to_the_same_bytes(
    digits: Path, weld: Weld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelweld.stages import merge as stage

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    settings = {"calibration": rows(digits), "rows": 64}
    weld("whole", **settings)
    monkeypatch.setattr(stage, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        weld("cut", **settings)
    monkeypatch.undo()
    assert not (tmp_path / "cut").exists()
    report = weld("cut", **settings)
    assert report.resumed > 0
    for file in ("model.safetensors", "manifest.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
