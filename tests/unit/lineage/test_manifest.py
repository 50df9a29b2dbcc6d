"""The manifest: canonical, free of clocks and places, and true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from modelweld.checkpoints import Checkpoint, file_sha256, tensor_digest
from modelweld.checkpoints.digests import holds
from modelweld.errors import CheckpointError
from modelweld.lineage import manifest
from modelweld.stages.merge import merge, merge_baselines, merge_pipeline
from tests.conftest import Family
from tests.support.families import LLAMA_SHAPES, recipe, tree_bytes, write_family


def test_equal_merges_elsewhere_have_equal_manifests(tmp_path: Path) -> None:
    one, two = write_family(tmp_path / "here"), write_family(tmp_path / "somewhere" / "else")
    merge(recipe(one, "ties"), tmp_path / "a", threads=1)
    merge(recipe(two, "ties"), tmp_path / "deep" / "b", threads=3)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "deep" / "b")
    text = (tmp_path / "a" / "manifest.json").read_text()
    assert str(tmp_path) not in text


def test_parents_and_outputs_are_what_lies_on_disk(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "dare", weights=[1.0, 0.5, 2.0]), tmp_path / "out", sha256=True)
    document = manifest.read(tmp_path / "out").data()
    assert document["recipe"]["seed"] == 0
    assert document["methods"] == {"dare": {"version": "1"}}
    with Checkpoint.open(root / "e1") as expert, Checkpoint.open(tmp_path / "out") as out:
        for name in LLAMA_SHAPES:
            assert document["parents"]["experts"]["e1"]["tensors"][name] == tensor_digest(expert, name)
            assert document["tensors"][name]["digest"] == tensor_digest(out, name)
    assert document["parents"]["experts"]["e1"]["weight"] == 0.5
    assert document["parents"]["base"]["tensors"].keys() == LLAMA_SHAPES.keys()
    for name, entry in document["output"]["files"].items():
        assert file_sha256(tmp_path / "out" / name) == entry["sha256"]
    assert manifest.read(tmp_path / "out").to_json().encode() == (tmp_path / "out" / "manifest.json").read_bytes()


def test_verify_names_what_was_touched(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "average"), tmp_path / "out")
    assert manifest.verify(tmp_path / "out") == []
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    (tmp_path / "out" / "extra.bin").touch()
    (tmp_path / "out" / "tokenizer.json").unlink()
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        last = max(checkpoint.tensors.values(), key=lambda info: info.offset).name
    assert manifest.verify(tmp_path / "out") == [
        "model.safetensors has other bytes than the manifest says",
        "tokenizer.json is missing",
        "extra.bin is not in the manifest",
        f"tensor {last} has other bytes than the manifest says",
    ]


def test_a_shard_is_known_by_its_header_and_its_tensors(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "average"), tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    entry = manifest.read(tmp_path / "out").output.files["model.safetensors"]
    assert holds(weights, entry)
    data = weights.read_bytes()
    for other in (data.replace(b'"format":"pt"', b'"format":"tf"'), data[:-1] + bytes([data[-1] ^ 1]), data[:-1]):
        weights.write_bytes(other)
        assert not holds(weights, entry)


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable manifest of a merge"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": "modelweld.manifest/9"}))
    with pytest.raises(CheckpointError, match=r"schema is 'modelweld.manifest/9', known is modelweld.manifest/1"):
        manifest.read(tmp_path)


def test_the_pipeline_merges_with_pinned_parents_and_its_baselines(tmp_path: Path, tiny_bert_family: Family) -> None:
    (tmp_path / "models").symlink_to(tiny_bert_family.root / "models")
    source = {"uri": "hf://acme/base@main", "licence": "apache-2.0"}
    params = {
        "name": "tiny",
        "models": dict.fromkeys(["base", *tiny_bert_family.tasks], source),
        "datasets": {task: {"uri": f"datasets/{task}"} for task in tiny_bert_family.tasks},
        "tasks": {f"{task}-task": {"model": task, "dataset": task} for task in tiny_bert_family.tasks},
        "validate": {},
        "merge": {"method": "drm", "drop_rate": 0.5},
        "evaluate": {},
        "baselines": {"average": {"method": "average"}, "ties": {"method": "ties"}},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    entry = {"kind": "model", "resolved": "hf://acme/base@0123", "revision": "0123", "path": "models/x", **source}
    pinned = {f"model-{name}": {**entry, "name": name, "files": {}} for name in params["models"]}
    (tmp_path / "sources.lock.json").write_text(json.dumps({"version": 1, "pinned": pinned}))
    report = merge_pipeline(Path("params.yaml"), tmp_path)
    assert json.loads(json.dumps(report))["heads"] == [f"{task}-task" for task in tiny_bert_family.tasks]
    document = manifest.read(tmp_path / "merged").data()
    assert document["parents"]["base"]["source"]["revision"] == "0123"
    assert all("sha256" in file for file in document["output"]["files"].values())
    front = yaml.safe_load((tmp_path / "merged" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["acme/base"] * 3
    assert front["base_model_relation"] == "merge"
    assert front["license"] == "apache-2.0"
    (tmp_path / "baselines").mkdir()
    merge(recipe(write_family(tmp_path / "other"), "average"), tmp_path / "baselines" / "stale")
    merge_baselines(Path("params.yaml"), tmp_path)
    assert sorted(path.name for path in (tmp_path / "baselines").iterdir()) == ["average", "ties"]
    assert not (tmp_path / "baselines" / "ties" / "README.md").exists()
    assert manifest.verify(tmp_path / "merged") == manifest.verify(tmp_path / "baselines" / "ties") == []
    before = tree_bytes(tmp_path / "merged")
    merge_pipeline(Path("params.yaml"), tmp_path)
    assert tree_bytes(tmp_path / "merged") == before
