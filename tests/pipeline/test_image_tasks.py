"""Image tasks through the stages: digits in two tasks, a tiny ViT an expert; validate, merge, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits

from modelweld.cli.app import main
from modelweld.config import load_params
from modelweld.errors import CheckpointError, GateRefused, InputError
from modelweld.stages.evaluate import evaluate
from modelweld.stages.merge import merge_baselines, merge_pipeline
from modelweld.stages.validate import validate
from tests.support.pictures import png, train

TASKS = {"low": ("0", "1", "2"), "high": ("7", "8", "9")}
SPREAD = 0.35


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose models and data are there and whose merge stages ran."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

    root = tmp_path_factory.mktemp("images")
    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    shape = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "image_size": 8,
        "patch_size": 2, "num_channels": 1, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.3], image_std=[SPREAD])
    torch.manual_seed(0)
    base = ViTModel(ViTConfig(**shape), add_pooling_layer=False)
    base.save_pretrained(root / "models" / "base")
    processor.save_pretrained(root / "models" / "base")
    for task, names in TASKS.items():
        chosen = np.flatnonzero(np.isin(digits.target, [int(name) for name in names]))
        _, unique = np.unique(pixels[chosen].reshape(len(chosen), -1), axis=0, return_index=True)
        chosen = chosen[np.sort(unique)]
        labels = digits.target[chosen]
        bounds = {"train": slice(0, 380), "validation": slice(380, 420), "test": slice(420, None)}
        (root / "datasets" / task).mkdir(parents=True)
        for split, part in bounds.items():
            pd.DataFrame(
                {"image": [png(pixels[row]) for row in chosen[part]], "label": [str(one) for one in labels[part]]}
            ).to_parquet(root / "datasets" / task / f"{split}.parquet", index=False)
        config = ViTConfig(**shape, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
        expert = ViTForImageClassification(config)
        expert.vit.load_state_dict(base.state_dict(), strict=False)
        inputs = (torch.from_numpy(pixels[chosen[:380]]).float().unsqueeze(1) / 255 - 0.3) / SPREAD
        train(expert, inputs, torch.tensor([names.index(str(one)) for one in labels[:380]]))
        expert.save_pretrained(root / "models" / task)
        processor.save_pretrained(root / "models" / task)
    document = {
        "name": "digits",
        "models": {name: {"uri": str(root / "models" / name), "licence": "mit"} for name in ["base", *TASKS]},
        "datasets": {task: {"uri": str(root / "datasets" / task), "licence": "cc-by-4.0"} for task in TASKS},
        "tasks": {task: {"model": task, "dataset": task, "kind": "image-classification"} for task in TASKS},
        "validate": {"max_relative_delta": 10.0},
        "merge": {"method": "task_arithmetic", "scale": 0.6},
        "baselines": {"average": {"method": "average"}},
        "evaluate": {"bootstrap": 20},
    }
    (root / "params.yaml").write_text(json.dumps(document))
    merge_pipeline(root / "params.yaml", root)
    merge_baselines(root / "params.yaml", root)
    return root


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELWELD_PROJECT_ROOT", raising=False)
    monkeypatch.setenv("MODELWELD_DEVICE", "cpu")


def test_sound_images_pass_the_gate(finished: Path) -> None:
    assert validate(finished / "params.yaml", finished)["verdict"] == "pass"
    results = json.loads((finished / "validation" / "gate.json").read_text())["results"]
    assert {item["expectation"] for item in results if item["subject"] == "task:low"} >= {
        "images_are_readable", "images_are_distinct", "no_image_leaked_from_training",
    }  # fmt: skip


def test_every_system_is_scored_on_images_and_the_cache_changes_nothing(finished: Path) -> None:
    document = evaluate("low", finished / "params.yaml", finished)
    assert list(document["systems"]) == ["base", "expert", "average", "merged"]
    accuracy = {name: entry["accuracy"]["value"] for name, entry in document["systems"].items()}
    assert accuracy["expert"] > 0.9
    assert accuracy["expert"] > accuracy["base"] + 0.2
    truth = pd.read_parquet(finished / "datasets" / "low" / "test.parquet")["label"]
    kept = pd.read_parquet(finished / "predictions" / "low.parquet")
    assert list(kept["label"]) == list(truth)
    assert (kept["expert"] == kept["label"]).mean() == pytest.approx(accuracy["expert"])
    before = (finished / "scores" / "low.json").read_bytes()
    evaluate("low", finished / "params.yaml", finished)
    assert (finished / "scores" / "low.json").read_bytes() == before


def test_a_broken_and_a_leaked_image_are_refused(finished: Path, tmp_path: Path) -> None:
    import shutil

    root = Path(shutil.copytree(finished, tmp_path / "project"))
    path = root / "datasets" / "high" / "test.parquet"
    rows = pd.read_parquet(path)
    rows.at[0, "image"] = b"broken"
    rows.at[1, "image"] = pd.read_parquet(path.with_name("train.parquet"))["image"][0]
    rows.to_parquet(path, index=False)
    with pytest.raises(GateRefused):
        validate(root / "params.yaml", root)
    failed = {
        item["expectation"]: item["where"]
        for item in json.loads((root / "validation" / "gate.json").read_text())["results"]
        if not item["success"] and item["subject"] == "task:high"
    }
    assert failed["images_are_readable"] == "datasets/high/test.parquet: row 0"
    assert failed["no_image_leaked_from_training"] == "datasets/high/test.parquet: row 1"
    with pytest.raises(InputError, match="row 0: 6 bytes"):
        evaluate("high", root / "params.yaml", root)


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0)


def test_by_hand_a_column_of_images_says_that_images_are_classified(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = str(finished / "datasets" / "low")
    assert run(["evaluate", str(finished / "models" / "low"), "--dataset", rows, "--image", "image", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    kept = evaluate("low", finished / "params.yaml", finished)
    assert document["systems"]["model"]["accuracy"]["value"] == kept["systems"]["expert"]["accuracy"]["value"]
    by_role = ["--dataset", rows, "--column", "image=image", "--column", "label=label"]
    assert run(["evaluate", str(finished / "models" / "low"), *by_role, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document
    assert run(["evaluate", str(finished / "models" / "low"), *by_role, "--column", "picture=image"]) == 2
    assert "roles are text, label, image" in capsys.readouterr().err
    assert run(["evaluate", str(finished / "models" / "low"), *by_role, "--label", "image"]) == 2
    assert "two columns of role label" in capsys.readouterr().err
    named = ["--dataset", rows, "--kind", "text-classification", "--text", "label"]
    assert run(["evaluate", str(finished / "models" / "low"), *named]) == 2
    assert "classifies no texts" in capsys.readouterr().err


def test_jointly_every_head_answers_every_row(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = ["--params", str(finished / "params.yaml")]
    assert run(["evaluate", str(finished / "merged"), "--joint", *params, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["classes"] == {"high": ["7", "8", "9"], "low": ["0", "1", "2"]}
    assert document["rows"] == sum(len(pd.read_parquet(finished / "datasets" / t / "test.parquet")) for t in TASKS)
    for task in TASKS:
        alone = evaluate(task, finished / "params.yaml", finished)["systems"]
        assert document["within"][task]["ensemble"] == alone["expert"]["accuracy"]["value"]
        assert document["within"][task]["model"] == alone["merged"]["accuracy"]["value"]
    # Among twice as many classes nobody can be right more often.
    joint = {name: found["accuracy"]["value"] for name, found in document["systems"].items()}
    assert joint["ensemble"] <= max(found["ensemble"] for found in document["within"].values())
    assert document["systems"]["ensemble"]["normalised"] == 1.0
    assert run(["evaluate", str(finished / "merged"), "--joint", *params]) == 0
    assert "within each task" in capsys.readouterr().out


def test_jointly_needs_heads_of_image_tasks(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = ["--params", str(finished / "params.yaml")]
    assert run(["evaluate", str(finished / "models" / "low"), "--joint", *params]) == 2
    assert "two heads or more" in capsys.readouterr().err
    assert run(["evaluate", str(finished / "merged"), "--joint", "--task", "low", *params]) == 2
    assert "--task" in capsys.readouterr().err


def test_a_pipeline_aligns_image_tasks_by_their_own_rows(finished: Path, tmp_path: Path) -> None:
    document = json.loads((finished / "params.yaml").read_text())
    document["merge"] = {"method": "mudsc", "align": {"alpha": "auto"}}
    document["tasks"]["high"]["train_split"] = None
    (tmp_path / "params.yaml").write_text(json.dumps(document))
    align = load_params(tmp_path / "params.yaml").recipe().alignment
    assert align is not None
    assert align.calibration is not None
    assert align.validation is not None
    assert set(align.calibration) == {"low"}, "a task without a train split gives no rows"
    assert set(align.validation) == set(TASKS)
    rows = align.calibration["low"]
    assert (rows.dataset, rows.split, rows.image) == ("datasets/low", "train", "image")
    assert align.validation["high"].split == "validation"


def test_the_wrong_kind_of_task_is_named(finished: Path, tmp_path: Path) -> None:
    document = json.loads((finished / "params.yaml").read_text())
    document["tasks"]["low"] |= {"kind": "text-classification", "text": "label"}
    (finished / "wrong.yaml").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="ViTForImageClassification classifies no texts"):
        evaluate("low", finished / "wrong.yaml", finished)
