"""Adapters through the pipeline, beside a whole finetune: pinned, fetched, validated, merged, scored and registered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from modelweld.checkpoints import Checkpoint
from modelweld.checkpoints.adapter import Adapter
from modelweld.checkpoints.loading import load, load_tokenizer
from modelweld.cli import main
from modelweld.config import load_params
from modelweld.errors import GateRefused, SourceError
from modelweld.sources import pin
from modelweld.stages.evaluate import evaluate
from modelweld.stages.fetch import fetch
from modelweld.stages.merge import merge_baselines, merge_pipeline
from modelweld.stages.validate import validate
from modelweld.workspace import Project
from tests.conftest import Family, build_family, pipeline_params
from tests.support.adapters import write_classifier_adapter
from tests.support.command import answer, git, modelweld

pytest.importorskip("peft")

WEIGHT = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def mixed_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base, the whole finetune `animal`, and two adapters: `colour` with its classes, `mammal` as PEFT leaves it."""
    family = build_family(tmp_path_factory.mktemp("mixed") / "family")
    shutil.rmtree(family.expert("colour"))
    write_classifier_adapter(family, family.expert("colour"), "colour", labels=family.tasks["colour"], seed=1)
    write_classifier_adapter(family, family.expert("mammal"), "animal", seed=2)
    return family


def params(family: Family, **changes: Any) -> str:
    document = json.loads(pipeline_params(family))
    document["models"]["mammal"] = {"uri": str(family.expert("mammal")), "licence": "apache-2.0"}
    document["tasks"]["mammal"] = {"model": "mammal", "dataset": "animal", "max_length": 16}
    return json.dumps(document | changes)


@pytest.fixture
def project(mixed_family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MODELWELD_PROJECT_ROOT", raising=False)
    monkeypatch.setenv("MODELWELD_DEVICE", "cpu")
    (tmp_path / "params.yaml").write_text(params(mixed_family))
    return tmp_path


def fetched(project: Path) -> dict[str, dict[str, Any]]:
    lock = pin(load_params(project / "params.yaml"), project)
    return {key: fetch(key, project) for key in lock.pinned}


def test_adapters_are_fetched_validated_merged_and_scored(project: Path, mixed_family: Family) -> None:
    told = fetched(project)
    assert [told[f"model-{name}"]["what"] for name in ("base", "animal", "colour", "mammal")] == [
        *("model", "model", "adapter", "adapter")
    ]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (project / "models/mammal" / name).read_bytes() == (mixed_family.expert("mammal") / name).read_bytes()
    assert validate(project / "params.yaml", project)["warnings"] == []
    inventory = pd.read_csv(project / ".modelweld/inventory/mammal.csv").set_index("name")
    assert inventory.loc[WEIGHT, "delta_rank"] == 4
    assert 0 < inventory.loc[WEIGHT, "relative_delta"] < 0.5

    report = merge_pipeline(project / "params.yaml", project)
    assert set(report["heads"]) == {"animal", "colour", "mammal"}
    merge_baselines(project / "params.yaml", project)
    scores = {task: evaluate(task, project / "params.yaml", project)["systems"] for task in ("colour", "mammal")}
    for task in scores:
        # What PEFT itself says of the expert, on the very rows.
        import peft
        from transformers import AutoModelForSequenceClassification

        data = pd.read_parquet(project / "datasets" / ("colour" if task == "colour" else "animal") / "test.parquet")
        count = int(data["label"].max()) + 1
        model = AutoModelForSequenceClassification.from_pretrained(mixed_family.base, num_labels=count)
        wrapped = peft.PeftModel.from_pretrained(model, mixed_family.expert(task)).eval()
        batch = load_tokenizer(mixed_family.base)(list(data["text"]), padding=True, return_tensors="pt")
        with torch.inference_mode():
            chosen = wrapped(**batch).logits.argmax(-1).tolist()
        right = float((data["label"].to_numpy() == chosen).mean())
        assert right > 0.8
        assert scores[task]["expert"]["accuracy"]["value"] == pytest.approx(right, abs=1e-6)
        assert {"base", "expert", "average", "merged"} == set(scores[task])
    assert scores["mammal"]["base"]["model_digest"] != scores["mammal"]["expert"]["model_digest"]


def test_a_merge_kept_as_an_adapter_is_scored_like_the_folded_one(
    project: Path, mixed_family: Family, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(params(mixed_family))
    del document["models"]["animal"], document["tasks"]["animal"]
    recipe = {"method": "drm", "drop_rate": 0.5}
    document |= {"merge": recipe, "baselines": {"kept": recipe | {"output": {"adapter": "keep"}}}}
    (project / "params.yaml").write_text(json.dumps(document))
    fetched(project)
    merge_pipeline(project / "params.yaml", project)
    merge_baselines(project / "params.yaml", project)
    kept = project / "baselines" / "kept"
    assert (kept / "adapter_model.safetensors").is_file()
    for task in ("colour", "mammal"):
        systems = evaluate(task, project / "params.yaml", project)["systems"]
        assert systems["kept"]["accuracy"] == systems["merged"]["accuracy"]
        assert systems["kept"]["model_digest"] != systems["merged"]["model_digest"]

    monkeypatch.chdir(project)
    code, out = command(capsys, "evaluate", "baselines/kept", "--task", "colour", "--expert", "models/colour", "--json")
    assert (code, json.loads(out)["systems"]["model"]["accuracy"]) == (0, evaluate_again(project, "colour"))
    code, out = command(capsys, "evaluate", "models/mammal", "--dataset", "datasets/animal", "--json")
    assert code == 0, out
    code, _ = command(capsys, "export", "plain", "--model", "baselines/kept", "--task", "colour")
    assert code == 0
    assert torch.equal(load("plain").state_dict()["classifier.weight"], load("merged", "colour").classifier.weight)
    code, out = command(capsys, "evaluate", "plain", "--dataset", "datasets/colour", "--json")
    assert (code, json.loads(out)["systems"]["model"]["accuracy"]) == (0, evaluate_again(project, "colour"))
    (project / "models" / "base").rename(project / "elsewhere")
    shutil.rmtree(project / "plain")
    edit_config(kept, base_model_name_or_path="org/gone")
    code, out = command(capsys, "export", "plain", "--model", "baselines/kept", "--task", "colour", "--json")
    assert (code, json.loads(out)["what"]) == (2, "is an adapter, and its base (org/gone) is not here")
    words = ("export", "plain", "--model", "baselines/kept", "--task", "colour", "--base", "elsewhere")
    assert command(capsys, *words)[0] == 0


def evaluate_again(project: Path, task: str) -> dict[str, float]:
    document = json.loads((project / "scores" / f"{task}.json").read_text())
    accuracy: dict[str, float] = document["systems"]["kept"]["accuracy"]
    return accuracy


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as leaving:
        main(list(words))
    return int(leaving.value.code or 0), capsys.readouterr().out


def edit_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(adapter: Path, part: str, value: float) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if part in name:
            tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, file)


SPOILT: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "nan": (lambda a: edit_weights(a, "layer.0.attention.self.query.lora_A", torch.nan), {"tensors_are_finite"}),
    "head": (lambda a: edit_weights(a, "classifier", torch.inf), {"tensors_are_finite", "differs_from_other_experts"}),
    "untrained": (lambda a: edit_weights(a, "lora_B", 0.0), {"differs_from_base"}),
    "loud": (lambda a: edit_config(a, lora_alpha=100_000), {"finetuned_from_base"}),
    "dora": (lambda a: edit_config(a, use_dora=True), {"source_can_be_read"}),
    "rank": (lambda a: edit_config(a, r=3), {"source_can_be_read"}),
    "again": (lambda a: None, {"differs_from_other_experts"}),
    "mammal": (lambda a: edit_config(a, base_model_name_or_path="org/another"), {"differs_from_other_experts"}),
}


def test_spoilt_adapters_are_refused_by_name_and_another_base_is_a_warning(project: Path, mixed_family: Family) -> None:
    document = json.loads(params(mixed_family))
    for name in ("base", "animal", "colour"):
        shutil.copytree(mixed_family.root / "models" / name, project / "models" / name)
    for name, (spoil, _) in SPOILT.items():
        document["models"][name] = {"uri": str(mixed_family.expert("mammal")), "licence": "mit"}
        shutil.copytree(mixed_family.expert("mammal"), project / "models" / name)
        spoil(project / "models" / name)
    shutil.copytree(mixed_family.root / "datasets", project / "datasets")
    (project / "params.yaml").write_text(json.dumps(document))
    with pytest.raises(GateRefused, match="untrained"):
        validate(project / "params.yaml", project)
    gate = json.loads((project / "validation/gate.json").read_text())
    failed = [found for found in gate["results"] if not found["success"]]
    critical = {(found["subject"], found["expectation"]) for found in failed if found["critical"]}
    assert critical == {(f"model:{name}", refusal) for name, (_, refusals) in SPOILT.items() for refusal in refusals}
    named = next(found for found in failed if found["expectation"] == "adapter_names_this_base")
    assert (named["subject"], named["critical"], named["observed"]) == ("model:mammal", False, "org/another")
    assert {found["subject"] for found in failed if not found["critical"]} == {"model:mammal", "model:loud"}


def test_adapters_are_not_measured_beside_a_base_that_cannot_be_read(project: Path) -> None:
    fetched(project)
    (project / "models/base/model.safetensors").write_bytes(b"short")
    (project / "sources.lock.json").unlink()
    with pytest.raises(GateRefused, match="model:base"):
        validate(project / "params.yaml", project)
    gate = json.loads((project / "validation/gate.json").read_text())
    failed = {(found["subject"], found["expectation"]) for found in gate["results"] if not found["success"]}
    assert failed == {("model:base", "source_can_be_read")}


def test_a_pickled_adapter_is_refused_or_rewritten(project: Path, mixed_family: Family, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(mixed_family.expert("mammal"), pickled)
    weights = load_file(pickled / "adapter_model.safetensors")
    (pickled / "adapter_model.safetensors").unlink()
    torch.save(weights, pickled / "adapter_model.bin")
    document = json.loads(params(mixed_family))
    document["models"]["mammal"] = {"uri": str(pickled), "licence": "mit"}
    (project / "params.yaml").write_text(json.dumps(document))
    with pytest.raises(SourceError, match="the weights are pickled"):
        fetched(project)
    document["models"]["mammal"]["allow_pickle"] = True
    (project / "params.yaml").write_text(json.dumps(document))
    assert fetched(project)["model-mammal"]["what"] == "adapter"
    rewritten = load_file(project / "models/mammal/adapter_model.safetensors")
    assert rewritten.keys() == weights.keys()
    assert all(torch.equal(rewritten[name], tensor) for name, tensor in weights.items())
    with Checkpoint.open(project / "models/base") as base:
        assert WEIGHT in Adapter.open(project / "models/mammal", base, "mammal").pairs


@pytest.mark.slow
def test_a_run_registers_a_merge_of_adapters_and_a_whole_finetune(mixed_family: Family, tmp_path: Path) -> None:
    root = tmp_path / "project"
    root.mkdir()
    modelweld(root, "init")
    git(root, "config", "user.email", "ada@example.org")
    git(root, "config", "user.name", "Ada")
    tasks = {"mammal": {"model": "mammal", "dataset": "animal", "max_length": 16}}
    data = {"animal": {"uri": str(mixed_family.dataset("animal"))}}
    (root / "params.yaml").write_text(params(mixed_family, validate={}, tasks=tasks, datasets=data, baselines={}))
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    done = answer(modelweld(root, "run", "--json"))
    assert done["status"] == "registered"
    assert done["registered"]["version"] == 1
    ran = [stage for repro in done["stages"] for stage in repro["ran"]]
    assert {"fetch@model-mammal", "validate", "merge", "evaluate@mammal"} <= set(ran)
    (record,) = Project.find(root).records("tiny")
    scores = json.loads(record.read("scores/mammal.json"))["systems"]
    assert scores["expert"]["accuracy"]["value"] > 0.8
    assert {"base", "expert", "merged"} == set(scores)
