"""Aligned merges in the pipeline: `modelweld run` to a registered version, and stage by stage for strangers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from modelweld.stages.evaluate import evaluate
from modelweld.stages.merge import merge_baselines, merge_pipeline
from modelweld.stages.validate import validate
from modelweld.symmetry import derive_spec
from modelweld.workspace import Project
from tests.conftest import Family, build_family, pipeline_params
from tests.support.command import answer, clean_environment, git, modelweld

pytestmark = pytest.mark.slow
ALIGN = {"rows": 32, "max_length": 16}


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return build_family(tmp_path / "family")


def project(family: Family, root: Path, **params: Any) -> Path:
    root.mkdir()
    modelweld(root, "init")
    git(root, "config", "user.email", "ada@example.org")
    git(root, "config", "user.name", "Ada")
    (root / "params.yaml").write_text(pipeline_params(family, **params))
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    return root


def test_finetunes_of_one_base_run_to_registration_and_are_said_to_be_aligned(family: Family, tmp_path: Path) -> None:
    # One task of the two: every stage is a process of its own.
    only = {
        "datasets": {"animal": {"uri": str(family.dataset("animal")), "licence": "cc0-1.0"}},
        "tasks": {"animal": {"model": "animal", "dataset": "animal", "max_length": 16}},
    }
    root = project(family, tmp_path / "project", merge={"method": "mudsc", "align": ALIGN}, **only)
    done = answer(modelweld(root, "run", "--json"))
    assert done["status"] == "registered"
    assert any("aligned already" in note for note in done["notes"])
    (record,) = Project.find(root).records()
    subprocess.run(
        [sys.executable, "-m", "dvc", "get", str(root), "merged", "--rev", record.tag, "--out", "merged"],
        cwd=tmp_path, env=clean_environment(), check=True, timeout=100,
    )  # fmt: skip
    merged = tmp_path / "merged"
    manifest = json.loads((merged / "manifest.json").read_text())
    assert {"alignment.json", "alignment.safetensors"} <= manifest["output"]["files"].keys()
    assert json.loads((merged / "alignment.json").read_text())["calibration"]["sets"] == ["animal"]
    assert manifest["alignment"]["aligned_already"] is True
    card = (merged / "README.md").read_text()
    assert "the models are aligned already" in card
    assert "100.0% stay in place" in card


def test_strangers_pass_the_gate_of_an_aligned_merge_stage_by_stage(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODELWELD_PROJECT_ROOT", raising=False)
    model = hf.BertForSequenceClassification.from_pretrained(family.expert("animal"))
    spec = derive_spec(model.config)
    model.load_state_dict(spec.apply(model.state_dict(), spec.random(1)))
    model.save_pretrained(family.expert("animal"))
    align = ALIGN | {"alpha": "auto", "grid": [0.5, 1.0], "validation_rows": 20}
    root = tmp_path / "project"
    shutil.copytree(family.root, root)
    merges = {"merge": {"method": "average", "align": align}, "baselines": {"plain": {"method": "average"}}}
    params = root / "params.yaml"
    params.write_text(pipeline_params(family, **merges))
    for stage in (validate, merge_pipeline, merge_baselines, partial(evaluate, "animal")):
        stage(params, root)
    results = json.loads((root / "validation" / "gate.json").read_text())["results"]
    failed = {(one["subject"], one["expectation"]): one["critical"] for one in results if not one["success"]}
    assert ("model:animal", "finetuned_from_base") in failed
    assert not any(failed.values()), "only warnings"
    document = json.loads((root / "merged" / "alignment.json").read_text())
    assert not document["aligned_already"]
    assert document["identity_share"] < 0.5
    assert document["alpha_scored_by"] == "average"
    assert {"merged", "plain"} <= json.loads((root / "scores" / "animal.json").read_text())["systems"].keys()
