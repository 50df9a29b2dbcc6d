"""What release 0.1 wrote, read and verified by this one: documents, records, the ledger, MLflow, whole versions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modelweld.alignment.plane import Order
from modelweld.checkpoints import Checkpoint
from modelweld.config import load_params
from modelweld.config.align import Align
from modelweld.engine import open_inputs
from modelweld.errors import WorkspaceError
from modelweld.evaluation import scoreboard
from modelweld.formats import AlignmentRecord, DvcAddress, Gate, Lock, RunRecord, TaskScores
from modelweld.lineage import manifest, model_card
from modelweld.registry.audit import audit
from modelweld.registry.from_record import register_record, registration_from_record
from modelweld.registry.ledger import FILE, Ledger
from modelweld.registry.promotion import nominate, open_registry, rollback
from modelweld.workspace import Project, materialise
from modelweld.workspace import records as workspace_records
from modelweld.workspace.rederiving import rederive
from tests.support.frozen import fetched, git, restore

FROZEN = Path(__file__).parent / "v0.1"
NAME = "tiny"
RUNS = ("plain", "refused", "aligned")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EVENTS = [
    "challenger",
    "promoted",
    "refused",
    "promoted",
    "challenger",
    "promoted",
    "rolled_back",
    "observed",
    "promoted",
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project of release 0.1 as it was, at a place of its own, with everything in the remote and nothing cached."""
    root = restore(FROZEN, tmp_path / "project")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    monkeypatch.setenv("MODELWELD_PROJECT_ROOT", str(root))
    monkeypatch.setenv("MODELWELD_DVC_REPO", str(root))
    monkeypatch.setenv("MODELWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELWELD_DEVICE", "cpu")
    return root


@pytest.fixture
def tags(project: Path) -> dict[str, str]:
    """The tags of the records by the names of the runs, which were made in this order."""
    return dict(zip(RUNS, reversed(workspace_records.tags(project)), strict=True))


def frozen(*parts: str) -> Any:
    return json.loads(FROZEN.joinpath(*parts).read_text(encoding="utf-8"))


# Documents


@pytest.mark.parametrize("run", RUNS)
def test_a_lock_is_read_and_written_again_as_it_was(run: str, tmp_path: Path) -> None:
    file = FROZEN / run / "sources.lock.json"
    lock = Lock.read(file)
    assert set(lock.pinned) == {"model-base", "model-colour", "model-animal", "dataset-colour", "dataset-animal"}
    base = lock.pinned["model-base"]
    assert (base.kind, base.name, base.licence, base.path) == ("model", "base", "apache-2.0", "models/base")
    assert base.files["model.safetensors"].size_bytes > 10_000
    assert lock.write(tmp_path / "sources.lock.json")
    assert (tmp_path / "sources.lock.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("run", RUNS)
def test_scores_are_read_and_written_again_as_they_were(run: str, tmp_path: Path) -> None:
    for task in ("colour", "animal"):
        file = FROZEN / run / "scores" / f"{task}.json"
        scores = TaskScores.read(file)
        assert (scores.task, scores.rows, scores.metric) == (task, 60, "accuracy")
        assert set(scores.systems) == {"base", "expert", "average", "merged"}
        scores.write(tmp_path / f"{task}.json")
        assert (tmp_path / f"{task}.json").read_bytes() == file.read_bytes()
    board = scoreboard(FROZEN / run / "scores")
    assert board.mean("expert") == 1.0
    assert 0 < board.mean("merged") <= 1.5


@pytest.mark.parametrize("name", ["plain/validation/gate.json", "aligned/validation/gate.json", "gate-refused.json"])
def test_a_gate_file_is_read_with_its_verdict_and_hints(name: str) -> None:
    file = FROZEN / name
    gate = Gate.read(file)
    assert gate.verdict == ("fail" if name == "gate-refused.json" else "pass")
    assert gate.verdict == json.loads(file.read_text())["verdict"]
    renamed = file.read_text().replace('"mend":', '"hint":').replace('"version": 1', '"version": 2')
    assert json.loads(gate.to_json()) == json.loads(renamed)
    assert all(result.hint and result.where for result in (*gate.refusals, *gate.warnings))


@pytest.mark.parametrize("run", RUNS)
def test_a_manifest_is_read_and_is_the_one_that_was_registered(run: str) -> None:
    file = FROZEN / run / "merged" / "manifest.json"
    found = manifest.read(file)
    assert found.to_json().encode() == file.read_bytes()
    registered = frozen("mlflow.json")[str(RUNS.index(run) + 1)]["tags"]
    assert found.digest == registered["modelweld.dvc.manifest_sha256"]
    assert manifest.model_digest(found.tensors, found.heads) == found.output.model_digest
    sources = [parent.source for parent in found.parents.experts.values()]
    assert {source.licence for source in sources if source is not None} == {"apache-2.0"}
    assert set(found.heads) == {"colour", "animal"}
    assert (found.alignment is not None) is (run == "aligned")
    assert model_card.render(found).count("apache-2.0") == 4


@pytest.mark.parametrize("run", RUNS)
def test_merged_weights_come_back_and_are_what_their_manifest_says(
    project: Path, tags: dict[str, str], run: str, tmp_path: Path
) -> None:
    place = materialise(Project.find(project), tags[run], "merged", tmp_path / run)
    assert manifest.verify(place) == []
    assert (place / "manifest.json").read_bytes() == (FROZEN / run / "merged" / "manifest.json").read_bytes()
    copied = shutil.copytree(place, tmp_path / "damaged", copy_function=shutil.copyfile)
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert "model.safetensors has other bytes than the manifest says" in manifest.verify(copied)


def test_the_recorded_alignment_brings_the_experts_to_the_merge(
    project: Path, tags: dict[str, str], tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    recipe = load_params(fetched(project, tags["aligned"], tmp_path, "merged")).recipe()
    paths = {
        name: entry.model_copy(update={"path": str(tmp_path / str(entry.path))})
        for name, entry in (recipe.models or {}).items()
    }
    recipe = recipe.model_copy(update={"base": str(tmp_path / str(recipe.base)), "models": paths})
    file = FROZEN / "aligned" / "merged" / "alignment.json"
    record = AlignmentRecord.read(file)
    assert record.to_json().encode() == file.read_bytes()
    assert record.identity_share < 0.9, "the frozen example moves units"
    with open_inputs(recipe) as inputs, Checkpoint.open(merged) as found:
        order = Order.of(Align(), inputs, merged, tmp_path)
        names = [expert.name_map.names for expert in inputs.experts]
        for name in found.tensors:
            experts = [inputs.experts[k].checkpoint.read(names[k][name]) for k in (0, 1)]
            common = [order.common(k, names[k][name], experts[k]) for k in (0, 1)]
            torch.testing.assert_close(found.read(name), torch.stack(common).mean(0), rtol=1e-5, atol=1e-6)


# Records


def test_records_are_read_with_what_their_tags_and_trees_say(project: Path, tags: dict[str, str]) -> None:
    found = Project.find(project).records(NAME)
    assert [record.tag for record in found] == [tags[run] for run in reversed(RUNS)]
    for record, run in zip(reversed(found), RUNS, strict=True):
        assert record.message == RunRecord.from_message((FROZEN / run / "record.txt").read_text(), run)
        assert (record.name, record.verdict, record.dirty) == (NAME, "pass", False)
        assert record.flow_run_id is not None
        assert record.run_id == record.tag.rsplit("/", 1)[-1]
        assert record.lock_digest == "sha256:" + hashlib.sha256(record.read("dvc.lock")).hexdigest()
        assert record.read("sources.lock.json") == (FROZEN / run / "sources.lock.json").read_bytes()
        assert record.files("scores") == ["scores/animal.json", "scores/colour.json"]


def test_the_newest_record_starts_the_next_run(project: Path, tags: dict[str, str]) -> None:
    with Project.find(project).worktree() as tree:
        assert tree.started_from is not None
        assert tree.started_from.tag == tags["aligned"]
        assert tree.gate_verdict() == "pass"
        assert tree.stale_stages() == []


@pytest.mark.parametrize("run", RUNS)
def test_a_registration_from_a_record_is_the_one_that_mlflow_was_told(
    project: Path, tags: dict[str, str], run: str
) -> None:
    registration = registration_from_record(project, tags[run])
    told = frozen("mlflow.json")[str(RUNS.index(run) + 1)]
    assert registration.record == told["tags"]["modelweld.record"]
    assert registration.commit == told["tags"]["modelweld.commit"]
    assert registration.lock_digest == told["tags"]["modelweld.lock_digest"]
    assert registration.address.md5 == told["tags"]["modelweld.dvc.md5"]
    assert registration.address.manifest_sha256 == told["tags"]["modelweld.dvc.manifest_sha256"]
    assert {parent.identity for parent in registration.parents} == {
        parent["tags"]["modelweld.parent_digest"] for parent in told["inputs"]
    }


@pytest.mark.slow
def test_rederiving_a_record_makes_its_weights_again(project: Path, tags: dict[str, str], tmp_path: Path) -> None:
    found = Project.find(project)
    done = rederive(found, found.record(tags["plain"]))
    assert (done.stage, done.recorded) == ("merge", frozen("mlflow.json")["1"]["tags"]["modelweld.dvc.md5"])
    # The manifest names the packages of the day, and another processor may round otherwise: not every byte is the same.
    cached = project / ".dvc" / "cache" / "files" / "md5"
    files = json.loads((cached / done.rebuilt[:2] / done.rebuilt[2:]).read_text())
    (digest,) = (entry["md5"] for entry in files if entry["relpath"] == "model.safetensors")
    recorded = materialise(found, tags["plain"], "merged/model.safetensors", tmp_path / "model.safetensors")
    rebuilt, expected = load_file(cached / digest[:2] / digest[2:]), load_file(recorded)
    assert rebuilt.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(rebuilt[name], tensor, rtol=1e-5, atol=1e-6)


# The ledger


def test_the_ledger_is_read_and_its_chain_verified(project: Path) -> None:
    events = Ledger(project, NAME).events()
    assert [event.kind for event in events] == EVENTS
    assert [event.version for event in events] == [1, 1, 2, 2, 3, 3, 2, 1, 3]
    assert events[-1].aliases == {"champion": 3, "previous": 1}
    told = frozen("mlflow.json")["3"]["tags"]
    assert events[-1].digest == told["modelweld.ledger"]
    assert git(project, "show", f"modelweld/ledger/{NAME}:{FILE}") == (FROZEN / "ledger" / FILE).read_text()


def test_a_ledger_with_one_changed_word_is_refused(project: Path) -> None:
    ledger = Ledger(project, NAME)
    text = (FROZEN / "ledger" / FILE).read_text().replace("version 3 was a trial", "version 3 was perfect")
    blob = git(project, "hash-object", "-w", "--stdin", stdin=text).strip()
    tree = git(project, "mktree", stdin=f"100644 blob {blob}\t{FILE}\n").strip()
    identity = ("-c", "user.name=eve", "-c", "user.email=eve@example.org")
    commit = git(project, *identity, "commit-tree", tree, "-p", f"{ledger.ref}^", "-m", "quiet").strip()
    git(project, "update-ref", ledger.ref, commit)
    with pytest.raises(WorkspaceError, match="does not follow the one before it"):
        ledger.events()


def test_the_ledger_goes_on_where_release_0_1_ended(project: Path) -> None:
    done = rollback(open_registry(project, NAME), at=NOW, actor="ada", reason="to go on")
    assert done.after == {"champion": 1, "previous": 2}
    assert [event.kind for event in Ledger(project, NAME).events()] == [*EVENTS, "rolled_back"]


# Registered versions


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_registered_version_passes_its_audit(project: Path, version: int) -> None:
    found = audit(open_registry(project, NAME), str(version), weights=True)
    assert [check for check in found.document["checks"] if not check["ok"]] == []
    told = frozen("mlflow.json")[str(version)]
    assert found.document["manifest_sha256"] == told["tags"]["modelweld.dvc.manifest_sha256"]
    assert found.document["gate"] == ("refused" if version == 2 else "passed")
    assert {parent["name"] for parent in found.document["parents"]} == {"base", "colour", "animal"}
    assert len(found.document["ledger"]) == [event.version for event in Ledger(project, NAME).events()].count(version)


def test_the_address_stands_in_tags_and_pointer_alike() -> None:
    for version, told in frozen("mlflow.json").items():
        address = DvcAddress.from_tags(told["tags"], version)
        assert address == DvcAddress.from_data(told["model_config"]["dvc"], version)
        assert address.rev == told["tags"]["modelweld.record"]


def test_decisions_and_scores_of_the_gate_are_read_from_tags(project: Path) -> None:
    registry = open_registry(project, NAME)
    assert set(registry.scoreboard(1)) == {"colour", "animal"}
    params = load_params(project / "params.yaml")
    refused = nominate(registry, 2, params.register_, at=NOW, actor="ada")
    assert not refused.passed
    assert "< 2.0" in refused.explain()
    assert nominate(registry, 1, params.register_, at=NOW, actor="ada").passed
    assert [event.kind for event in registry.ledger.events()] == EVENTS, "a version is decided on once"


def test_registering_a_record_again_finds_its_version(project: Path, tags: dict[str, str]) -> None:
    for version, run in enumerate(RUNS, start=1):
        outcome = register_record(project, tags[run], at=NOW, actor="ada")
        assert (outcome.registered.version, outcome.registered.created) == (version, False)


@pytest.mark.parametrize("version", [1, 3])
def test_mlflow_loads_a_version_which_predicts_as_it_was_scored(
    project: Path, tags: dict[str, str], version: int, tmp_path: Path
) -> None:
    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    model = mlflow.pyfunc.load_model(f"models:/{NAME}/{version}")
    run = RUNS[version - 1]
    for task in ("colour", "animal"):
        data = materialise(
            Project.find(project), tags[run], f"datasets/{task}/test.parquet", tmp_path / f"{task}.parquet"
        )
        rows = pd.read_parquet(data)
        told = json.loads((FROZEN / run / "scores" / f"{task}.json").read_text())
        names = sorted({"colour": ("red", "blue"), "animal": ("cat", "dog", "cow")}[task])
        answer = model.predict(rows, params={"task": task})
        assert set(answer["label"]) <= set(names)
        order = {"colour": ["red", "blue"], "animal": ["cat", "dog", "cow"]}[task]
        right = [order[label] == said for label, said in zip(rows["label"], answer["label"], strict=True)]
        # Another processor may decide otherwise where two labels are equally likely: a row or two.
        assert sum(right) / len(right) == pytest.approx(told["systems"]["merged"]["accuracy"]["value"], abs=0.05)
