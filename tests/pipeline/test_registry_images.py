"""Image tasks in the registry: recorded, registered, and predicted with from another process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelweld.checkpoints.loading import load
from modelweld.errors import InputError
from modelweld.registry.from_record import register_record
from modelweld.registry.prediction import Predictor, ServedTask
from modelweld.stages.merge import merge_pipeline
from modelweld.workspace import records
from modelweld.workspace.initialise import initialise
from tests.support.pictures import png
from tests.support.scores import system_scores, task_scores

TASKS = {"low": ("0", "1", "2"), "high": ("7", "8", "9")}
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
MEAN, SPREAD = 0.3, 0.35

CALLER = """
import base64, json, sys
import mlflow, numpy as np, pandas as pd
from mlflow.pyfunc.scoring_server import invocations

model = mlflow.pyfunc.load_model("models:/digits@challenger")
pixels = np.load(sys.argv[1])
encoded = [open(path, "rb").read() for path in sys.argv[2:]]
text = [base64.b64encode(one).decode() for one in encoded]
records = json.dumps({"dataframe_records": [{"image": one} for one in text], "params": {"task": "low"}})
inputs = {
    "frame of bytes": pd.DataFrame({"image": encoded}),
    "frame of arrays": pd.DataFrame({"image": list(pixels)}),
    "mapping of bytes": {"image": encoded},
    "mapping of base64": {"image": text},
    "mapping of one array": {"image": pixels},
    "mapping of lists": {"image": pixels.tolist()},
}
answers = {
    task: {name: model.predict(rows, params={"task": task}).to_dict("list") for name, rows in inputs.items()}
    for task in ("low", "high")
}
served = invocations(records, "application/json", model, model.metadata.get_input_schema()).response
refused = {}
for name, rows in {"path": ["/etc/hostname"], "several heads": encoded}.items():
    try:
        model.predict(pd.DataFrame({"image": rows}), params=None if name == "several heads" else {"task": "low"})
    except Exception as error:
        refused[name] = f"{type(error).__name__}: {error}"
print(json.dumps({
    "answers": answers,
    "served": json.loads(served)["predictions"],
    "refused": refused,
    "inputs": model.metadata.get_input_schema().to_dict(),
    "outputs": model.metadata.get_output_schema().to_dict(),
    "input": model.metadata.metadata["input"],
    "example": model.predict(model.input_example, params={"task": "low"}).to_dict("list"),
}))
"""


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=root, check=True, capture_output=True)


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_models(root: Path) -> None:
    """A ViT for grey 8 × 8 images, and an expert with a head of its own for each task."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

    shape = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "image_size": 8,
        "patch_size": 2, "num_channels": 1,
    }  # fmt: skip
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[MEAN], image_std=[SPREAD])
    torch.manual_seed(0)
    base = ViTModel(ViTConfig(**shape), add_pooling_layer=False)
    base.save_pretrained(root / "models" / "base")
    processor.save_pretrained(root / "models" / "base")
    for task, names in TASKS.items():
        config = ViTConfig(**shape, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
        expert = ViTForImageClassification(config)
        torch.nn.init.normal_(expert.classifier.weight)
        expert.save_pretrained(root / "models" / task)
        processor.save_pretrained(root / "models" / task)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project with one recorded merge of two image experts, and its tag."""
    root = tmp_path_factory.mktemp("digits")
    write_models(root)
    names = ["base", *TASKS]
    write_json(
        root / "params.yaml",
        {
            "name": "digits",
            "models": {name: {"uri": str(root / "models" / name), "licence": "mit"} for name in names},
            "datasets": {task: {"uri": task} for task in TASKS},
            "tasks": {task: {"model": task, "dataset": task, "kind": "image-classification"} for task in TASKS},
            "validate": {},
            "merge": {"method": "average"},
            "baselines": {},
            "evaluate": {},
        },
    )
    merge_pipeline(root / "params.yaml", root)
    (root / "merged").rename(root / "built")
    write_json(
        root / "dvc.yaml",
        {"stages": {"merge": {"cmd": "cp -r built merged", "deps": ["built"], "outs": ["merged"]}}},
    )
    initialise(root)
    git(root, "config", "user.name", "Ada")
    git(root, "config", "user.email", "ada@example.org")
    with (root / ".gitignore").open("a") as file:
        file.write("/built/\n")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "Begin")
    for command in (["repro", "--quiet"], ["push", "--quiet"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=root, check=True, capture_output=True)
    both = {"expert": system_scores(0.9, 1.0), "merged": system_scores(0.9, 1.0)}
    for task in TASKS:
        task_scores(task, both).write(root / "scores" / f"{task}.json")
    pinned = {}
    for name in names:
        files = {
            file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size_bytes": file.stat().st_size}
            for file in sorted((root / "models" / name).iterdir())
        }
        pinned[f"model-{name}"] = {
            "kind": "model", "name": name, "uri": name, "resolved": name, "revision": "r1", "licence": "mit",
            "allow_pickle": False, "path": f"models/{name}", "files": files,
        }  # fmt: skip
    write_json(root / "sources.lock.json", {"version": 1, "pinned": pinned})
    write_json(root / "validation" / "gate.json", {"version": 1, "verdict": "pass", "results": []})
    written = ["sources.lock.json", "validation/gate.json", *(f"scores/{task}.json" for task in TASKS)]
    record = records.write(
        root, root=root, name="digits", run_id="20260101T000000Z-aaaaaa", files=written, verdict="pass",
        flow_run_id=None, dirty=False,
    )  # fmt: skip
    return root, record.tag


def expected(root: Path, task: str) -> tuple[list[str], np.ndarray]:
    """Labels and probabilities as transformers gives them."""
    model = load(root / "merged", task)
    inputs = (torch.from_numpy(PIXELS).float().unsqueeze(1) / 255 - MEAN) / SPREAD
    with torch.inference_mode():
        best = model(pixel_values=inputs).logits.softmax(-1).max(-1)
    return [TASKS[task][number] for number in best.indices.tolist()], best.values.numpy()


@pytest.mark.slow
def test_an_image_version_predicts_in_a_fresh_process(
    recorded: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, tag = recorded
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MODELWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELWELD_DEVICE", "cpu")
    monkeypatch.setenv("MODELWELD_PROJECT_ROOT", str(root))
    outcome = register_record(root, tag, at=datetime(2026, 1, 2, tzinfo=UTC), actor="ada")
    assert outcome.aliases == {"challenger": 1}

    np.save(tmp_path / "pixels.npy", PIXELS)
    files = [tmp_path / f"{number}.png" for number in range(len(PIXELS))]
    for file, pixels in zip(files, PIXELS, strict=True):
        file.write_bytes(png(pixels))
    done = subprocess.run(
        [sys.executable, "-c", CALLER, str(tmp_path / "pixels.npy"), *map(str, files)],
        capture_output=True, text=True, timeout=300, env=os.environ, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    for task in TASKS:
        labels, confidences = expected(root, task)
        for name, answer in found["answers"][task].items():
            assert answer["label"] == labels, name
            assert answer["confidence"] == pytest.approx(confidences.tolist(), abs=1e-5), name
    assert [row["label"] for row in found["served"]] == expected(root, "low")[0], "base64 in JSON, as a server reads it"
    assert found["refused"]["path"].startswith("InputError: model_input: row 0: a string that is not base64")
    assert "several heads" in found["refused"]["several heads"]
    assert [(column["name"], column["type"], column["required"]) for column in found["inputs"]] == [
        ("image", "any", True)
    ]
    assert [column["name"] for column in found["outputs"]] == ["label", "confidence"]
    assert "column `image`" in found["input"]
    assert len(found["example"]["label"]) == 1


def test_heads_are_served_by_their_kind(recorded: tuple[Path, str]) -> None:
    root, _ = recorded
    predictor = Predictor(root / "merged", {task: ServedTask(1, "image-classification") for task in TASKS})
    for task in TASKS:
        labels, confidences = expected(root, task)
        answer = predictor.predict({"image": PIXELS}, task)
        assert list(answer["label"]) == labels
        assert answer["confidence"].to_numpy() == pytest.approx(confidences, abs=1e-5)
    assert list(predictor.predict([], "low").columns) == ["label", "confidence"]
    with pytest.raises(InputError, match="row 0: a string that is not base64"):
        predictor.predict(["a text"], "low")


def test_versions_that_0_1_0_registered_serve_texts() -> None:
    assert ServedTask.from_config(96) == ServedTask(96, "text-classification")
    assert ServedTask(96).to_config() == 96, "what 0.1.0 writes and reads"
    served = ServedTask(128, "image-classification")
    assert ServedTask.from_config(json.loads(json.dumps(served.to_config()))) == served
