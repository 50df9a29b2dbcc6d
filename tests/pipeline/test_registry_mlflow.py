"""A recorded run in a real git + DVC project, registered in a real MLflow, loaded, promoted, rolled back, audited."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from modelweld.checkpoints.digests import file_blake3
from modelweld.errors import (
    CheckpointError,
    GateRefused,
    InputError,
    RegistryUnavailable,
    RemoteUnavailable,
    WorkspaceError,
)
from modelweld.formats import Gate, TaskScores
from modelweld.registry import aliases
from modelweld.registry.audit import audit
from modelweld.registry.connection import connect
from modelweld.registry.from_record import (
    Outcome,
    latest_unregistered,
    register_record,
    registration_from_record,
)
from modelweld.registry.promotion import Registry, current_actor, open_registry, promote, rollback
from modelweld.registry.registration import register
from modelweld.workspace import Record
from modelweld.workspace import records as workspace_records
from modelweld.workspace.initialise import initialise
from tests.conftest import Family, pipeline_params
from tests.support.manifests import manifest_of
from tests.support.scores import system_scores, task_scores

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NAME = "tiny"
DVC_YAML = {"stages": {"merge": {"cmd": "cp -r built merged", "deps": ["built"], "outs": ["merged"]}}}

REGISTER_ONE = """
import json, sys
from datetime import UTC, datetime
from pathlib import Path
from modelweld.registry.from_record import register_record
done = register_record(Path(sys.argv[1]), sys.argv[2], at=datetime.now(UTC), actor="ada").registered
print(json.dumps([done.version, done.created]))
"""


@dataclass(frozen=True)
class Recorded:
    """A project with three records: fair, better, and one that the gate must refuse."""

    root: Path
    fair: str
    better: str
    bad: str

    @property
    def remote(self) -> Path:
        return self.root / ".modelweld" / "dvc-remote"

    @property
    def cache(self) -> Path:
        return self.root / ".dvc" / "cache"

    def lose_weights(self) -> None:
        """Leave them in the DVC remote only."""
        shutil.rmtree(self.cache)
        shutil.rmtree(self.root / "merged", ignore_errors=True)


def run(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def build_merged(family: Family, out: Path, shift: float) -> None:
    """A merged directory as the engine writes it: the base's backbone (moved by `shift`), a head a task."""
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True)
    for file in family.base.iterdir():
        shutil.copyfile(file, out / file.name)
    first = next(iter(family.tasks))
    expert = load_file(family.expert(first) / "model.safetensors")
    backbone = {name.removeprefix("bert."): tensor for name, tensor in expert.items() if name.startswith("bert.")}
    save_file({name: tensor + shift for name, tensor in backbone.items()}, out / "model.safetensors", {"format": "pt"})
    for task in family.tasks:
        weights = load_file(family.expert(task) / "model.safetensors")
        head = {name: tensor for name, tensor in weights.items() if not name.startswith("bert.")}
        (out / "heads" / task).mkdir(parents=True)
        save_file(head, out / "heads" / task / "head.safetensors", {"format": "pt", "modelweld.prefix": "bert."})
        shutil.copyfile(family.expert(task) / "config.json", out / "heads" / task / "config.json")
    files = {
        path.relative_to(out).as_posix(): {"size_bytes": path.stat().st_size, "blake3": file_blake3(path)}
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
    manifest_of(output={"model_digest": "0" * 64, "files": files}).write(out / "manifest.json")
    (out / "README.md").write_text("# tiny\n", encoding="utf-8")


def scores(task: str, relative: float) -> TaskScores:
    systems = {"base": 0.2, "expert": 1.0, "average": relative / 2, "merged": relative}
    return task_scores(task, {name: system_scores(0.9 * value, value) for name, value in systems.items()})


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def source_lock(family: Family) -> dict[str, Any]:
    pinned = {}
    for name in ["base", *family.tasks]:
        folder = family.root / "models" / name
        files = {
            file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size_bytes": file.stat().st_size}
            for file in sorted(folder.iterdir())
        }
        pinned[f"model-{name}"] = {
            "kind": "model",
            "name": name,
            "uri": str(folder),
            "resolved": f"somewhere/{name}",
            "revision": "r1",
            "licence": "apache-2.0",
            "allow_pickle": False,
            "path": f"models/{name}",
            "files": files,
        }
    return {"version": 1, "pinned": pinned}


def make_record(root: Path, family: Family, run_id: str, relative: float, shift: float) -> Record:
    shutil.rmtree(root / "built", ignore_errors=True)
    build_merged(family, root / "built", shift)
    run(root, sys.executable, "-m", "dvc", "repro", "--quiet")
    run(root, sys.executable, "-m", "dvc", "push", "--quiet")
    for task in family.tasks:
        scores(task, relative).write(root / "scores" / f"{task}.json")
    write_json(root / "sources.lock.json", source_lock(family))
    Gate.of([]).write(root / "validation" / "gate.json")
    files = ["sources.lock.json", "validation/gate.json", *(f"scores/{task}.json" for task in family.tasks)]
    return workspace_records.write(
        root, root=root, name=NAME, run_id=run_id, files=files, verdict="pass", flow_run_id=None, dirty=False
    )


def begin_project(root: Path, family: Family, remote: Path) -> None:
    """A committed project whose `merge` stage copies built/, with a DVC remote that every clone can reach."""
    write_json(root / "dvc.yaml", DVC_YAML)
    (root / "params.yaml").write_text(pipeline_params(family, register={"min_relative": 0.7}))
    initialise(root)
    run(root, sys.executable, "-m", "dvc", "remote", "modify", "store", "url", str(remote))
    run(root, "git", "config", "user.name", "Ada")
    run(root, "git", "config", "user.email", "ada@example.org")
    with (root / ".gitignore").open("a") as file:
        file.write("/built/\n")
    run(root, "git", "add", "--all")
    run(root, "git", "commit", "--quiet", "-m", "Begin")


@pytest.fixture(scope="module")
def recorded_once(tmp_path_factory: pytest.TempPathFactory, tiny_bert_family: Family) -> Recorded:
    root = tmp_path_factory.mktemp("project")
    begin_project(root, tiny_bert_family, root / ".modelweld" / "dvc-remote")
    made = [
        make_record(root, tiny_bert_family, f"2026010{number}T000000Z-aaaaaa", relative, shift)
        for number, (relative, shift) in enumerate([(0.8, 0.0), (0.9, 1e-4), (0.3, 1e-2)], start=1)
    ]
    shutil.rmtree(root / "built")
    return Recorded(root, *(record.tag for record in made))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def recorded(
    recorded_once: Recorded, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Recorded]:
    """The project of the module, an MLflow and a weights cache of the test's own, and no ledger yet."""
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MODELWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELWELD_DEVICE", "cpu")
    monkeypatch.setenv("MODELWELD_ACTOR", "ada")
    monkeypatch.setenv("MODELWELD_PROJECT_ROOT", str(recorded_once.root))
    kept = tmp_path / "kept-cache"
    shutil.copytree(recorded_once.cache, kept)
    yield recorded_once
    shutil.rmtree(recorded_once.cache, ignore_errors=True)
    shutil.copytree(kept, recorded_once.cache)
    run(recorded_once.root, "git", "update-ref", "-d", f"refs/heads/modelweld/ledger/{NAME}")


def entered(project: Recorded, tag: str) -> Outcome:
    return register_record(project.root, tag, at=NOW, actor="ada")


def opened(project: Recorded) -> Registry:
    return open_registry(project.root, NAME)


def load(uri: str) -> Any:
    import mlflow

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    return mlflow.pyfunc.load_model(uri)


def test_a_version_predicts_when_only_the_remote_holds_its_weights(
    recorded: Recorded, tiny_bert_family: Family
) -> None:
    import pandas as pd
    import torch

    from modelweld.checkpoints.loading import load as load_merged

    outcome = entered(recorded, recorded.fair)
    assert outcome.decision.passed
    assert outcome.aliases == {"challenger": 1}
    recorded.lose_weights()

    model = load(f"models:/{NAME}@challenger")
    rows = pd.read_parquet(tiny_bert_family.dataset("animal") / "test.parquet")
    answer = model.predict(rows, params={"task": "animal"})

    place = next((Path(os.environ["MODELWELD_CACHE_DIR"]) / "models").glob("*/manifest.json")).parent
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(place)(list(rows["text"]), padding=True, return_tensors="pt")
    with torch.inference_mode():
        chances = load_merged(place, "animal")(**batch).logits.softmax(-1)
    names = tiny_bert_family.tasks["animal"]
    assert list(answer["label"]) == [names[index] for index in chances.argmax(-1).tolist()]
    assert answer["confidence"].to_numpy() == pytest.approx(chances.max(-1).values.numpy(), abs=1e-5)
    assert model.predict(["a red scarlet thing"], params={"task": "colour"}).shape == (1, 2)


def test_a_model_of_several_heads_asks_which(recorded: Recorded) -> None:
    import pandas as pd

    entered(recorded, recorded.fair)
    model = load(f"models:/{NAME}/1")
    with pytest.raises(InputError, match="several heads") as several:
        model.predict(["text"])
    assert "animal, colour" in str(several.value)
    with pytest.raises(InputError, match="no head for task 'weather'"):
        model.predict(["text"], params={"task": "weather"})
    with pytest.raises(InputError, match="no column 'text'"):
        model.predict(pd.DataFrame({"body": ["x"]}), params={"task": "colour"})


def test_mlflow_holds_no_weights_but_the_whole_story(recorded: Recorded, tmp_path: Path) -> None:
    outcome = entered(recorded, recorded.fair)
    registry = opened(recorded)
    run_id = outcome.registered.run_id
    stored = [path for path in (tmp_path / ".modelweld" / "mlflow").rglob("*") if path.is_file()]
    assert {path.name for path in stored} >= {"manifest.json", "dvc.lock", "animal.json", "MLmodel", "pyfunc_model.py"}
    assert sum(path.stat().st_size for path in stored) < 100_000
    assert not [path for path in stored if path.suffix == ".safetensors"]

    story = registry.client.get_run(run_id)
    assert story.info.status == "FINISHED"
    assert story.data.metrics["animal/merged.normalised"] == pytest.approx(0.8)
    assert story.data.metrics["merged.mean_normalised"] == pytest.approx(0.8)
    assert story.data.params["merge.drop_rate"] == "0.5"
    parents = [registry.client.get_logged_model(item.model_id) for item in story.inputs.model_inputs]
    assert {parent.name for parent in parents} == {"base", "colour", "animal"}
    assert {parent.params["source"] for parent in parents} == {f"somewhere/{parent.name}" for parent in parents}
    manifest = next(path for path in stored if path.name == "manifest.json")
    assert (
        hashlib.sha256(manifest.read_bytes()).hexdigest() == registry.version(1).tags["modelweld.dvc.manifest_sha256"]
    )


def test_registering_twice_is_registering_once(recorded: Recorded) -> None:
    first, second = entered(recorded, recorded.fair), entered(recorded, recorded.fair)
    assert (first.registered.version, first.registered.created) == (1, True)
    assert (second.registered.version, second.registered.created) == (1, False)
    assert second.decision == first.decision
    assert [event.kind for event in opened(recorded).ledger.events()] == ["challenger"]


def test_parents_are_shared_between_versions(recorded: Recorded) -> None:
    versions = [entered(recorded, tag).registered for tag in (recorded.fair, recorded.better)]
    client = opened(recorded).client
    inputs = [{item.model_id for item in client.get_run(done.run_id).inputs.model_inputs} for done in versions]
    assert inputs[0] == inputs[1]
    assert len(inputs[0]) == 3


@pytest.mark.parametrize(
    "step", ["log_artifacts", "log_inputs", "log_model_artifacts", "create_model_version", "set_terminated"]
)
def test_a_registration_cut_off_at_any_step_is_finished_by_the_next(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    from mlflow import MlflowClient

    registration = registration_from_record(recorded.root, recorded.fair)
    uri = os.environ["MLFLOW_TRACKING_URI"]

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, step, die)
        with pytest.raises(KeyboardInterrupt):
            register(registration, uri)
    client = connect(uri)
    half = client.search_model_versions(f"name = '{NAME}'")
    assert len(half) == (1 if step == "set_terminated" else 0)

    done = register(registration, uri)
    assert done.version == 1
    assert client.get_run(done.run_id).info.status == "FINISHED"
    assert len(client.get_run(done.run_id).inputs.model_inputs) == 3
    assert len(client.search_runs([client.get_experiment_by_name(NAME).experiment_id])) == 1
    assert load(done.uri).predict(["red ruby"], params={"task": "colour"}).shape == (1, 2)


def test_a_refused_merge_is_registered_without_an_alias(recorded: Recorded) -> None:
    outcome = entered(recorded, recorded.bad)
    assert not outcome.decision.passed
    assert outcome.aliases == {}
    registry = opened(recorded)
    tags = registry.version(1).tags
    assert tags["modelweld.gate"] == "refused"
    assert "0.3000 of its expert < 0.7" in tags["modelweld.gate.reasons"]
    assert [event.kind for event in registry.ledger.events()] == ["refused"]
    with pytest.raises(GateRefused, match=r"0\.3000 of its expert"):
        promote(registry, "1", at=NOW, actor="ada")
    done = promote(registry, "1", at=NOW, actor="ada", override="the demo needs one")
    assert done.after == {"champion": 1}
    assert done.event is not None
    assert done.event.entry.override == "the demo needs one"


def test_promote_and_rollback(recorded: Recorded) -> None:
    entered(recorded, recorded.fair)
    registry = opened(recorded)
    assert promote(registry, "challenger", at=NOW, actor="ada").after == {"champion": 1}
    entered(recorded, recorded.better)
    assert promote(registry, "Challenger", at=NOW, actor="grace").after == {"champion": 2, "previous": 1}
    assert promote(registry, "2", at=NOW, actor="grace").event is None

    recorded.lose_weights()
    back = rollback(registry, at=NOW, actor="ada", reason="customers complain")
    assert back.after == {"champion": 1}
    with pytest.raises(InputError, match="no previous champion"):
        rollback(registry, at=NOW, actor="ada")

    events = registry.ledger.events()
    assert [(event.kind, event.version) for event in events] == [
        ("challenger", 1),
        ("promoted", 1),
        ("challenger", 2),
        ("promoted", 2),
        ("rolled_back", 1),
    ]
    assert events[3].entry.actor == "grace"
    assert events[4].entry.reason == "customers complain"
    assert events[4].entry.previous == events[3].digest


def test_rolling_back_twice_goes_two_champions_back(recorded: Recorded) -> None:
    registry = opened(recorded)
    for tag, reason in ((recorded.fair, None), (recorded.better, None), (recorded.bad, "hurry")):
        version = entered(recorded, tag).registered.version
        promote(registry, str(version), at=NOW, actor="ada", override=reason)
    assert registry.aliases() == {"champion": 3, "previous": 2}
    assert rollback(registry, at=NOW, actor="ada").after == {"champion": 2, "previous": 1}
    assert rollback(registry, at=NOW, actor="ada").after == {"champion": 1}


def test_rollback_refuses_weights_that_are_not_what_was_registered(recorded: Recorded) -> None:
    registry = opened(recorded)
    for tag in (recorded.fair, recorded.better):
        promote(registry, str(entered(recorded, tag).registered.version), at=NOW, actor="ada")
    registry.client.set_model_version_tag(NAME, "1", "modelweld.dvc.manifest_sha256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"manifest\.json is not what was registered"):
        rollback(registry, at=NOW, actor="ada")
    assert registry.aliases() == {"champion": 2, "previous": 1}


def test_a_damaged_local_copy_is_noticed_and_fetched_again(recorded: Recorded) -> None:
    entered(recorded, recorded.fair)
    load(f"models:/{NAME}/1")
    place = next((Path(os.environ["MODELWELD_CACHE_DIR"]) / "models").glob("*/model.safetensors"))
    raw = bytearray(place.read_bytes())
    raw[-1] ^= 1
    place.unlink()
    place.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was registered"):
        load(f"models:/{NAME}/1")
    assert load(f"models:/{NAME}/1").predict(["x"], params={"task": "colour"}).shape == (1, 2)


def test_a_file_slipped_into_the_local_copy_is_noticed(recorded: Recorded) -> None:
    entered(recorded, recorded.fair)
    load(f"models:/{NAME}/1")
    place = next((Path(os.environ["MODELWELD_CACHE_DIR"]) / "models").glob("*/config.json")).parent
    (place / "modeling_bert.py").write_text("print('hello')\n")
    with pytest.raises(CheckpointError, match=r"modeling_bert\.py is not what was registered"):
        load(f"models:/{NAME}/1")
    assert not place.exists()


@pytest.mark.parametrize("how", ["clone", "url"])
def test_a_version_loads_where_the_project_is_elsewhere(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    entered(recorded, recorded.fair)
    recorded.lose_weights()
    bare = tmp_path / "bare.git"
    run(tmp_path, "git", "clone", "--quiet", "--bare", str(recorded.root), str(bare))
    if how == "clone":
        run(tmp_path, "git", "clone", "--quiet", str(bare), "elsewhere")
        monkeypatch.setenv("MODELWELD_DVC_REPO", str(tmp_path / "elsewhere"))
    else:
        monkeypatch.setenv("MODELWELD_DVC_REPO", bare.as_uri())
    answer = load(f"models:/{NAME}/1").predict(["purr"], params={"task": "animal"})
    assert answer.shape == (1, 2)
    assert not recorded.cache.exists()


def test_a_repository_without_the_record_is_named(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entered(recorded, recorded.fair)
    run(tmp_path, "git", "clone", "--quiet", "--bare", "--no-tags", str(recorded.root), "bare.git")
    for place in ((tmp_path / "bare.git").as_uri(), (tmp_path / "nowhere.git").as_uri()):
        monkeypatch.setenv("MODELWELD_DVC_REPO", place)
        with pytest.raises(WorkspaceError, match="MODELWELD_DVC_REPO"):
            load(f"models:/{NAME}/1")


@pytest.mark.slow
def test_a_project_below_the_top_of_its_repository(
    recorded: Recorded, tiny_bert_family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "top"
    root = top / "models" / "tiny"
    root.mkdir(parents=True)
    run(top, "git", "init", "--quiet")
    run(root, sys.executable, "-m", "dvc", "init", "--quiet", "--subdir")
    run(root, sys.executable, "-m", "dvc", "remote", "add", "--quiet", "--default", "store", "replaced-below")
    # What `modelweld init` asks for is a repository of its own; here git is above.
    (root / ".git").mkdir()
    begin_project(root, tiny_bert_family, tmp_path / "remote")
    (root / ".git").rmdir()
    tag = make_record(root, tiny_bert_family, "20260104T000000Z-aaaaaa", 0.8, 0.0).tag
    assert register_record(root, tag, at=NOW, actor="ada").aliases == {"challenger": 1}
    run(tmp_path, "git", "clone", "--quiet", "--bare", str(top), "bare.git")
    shutil.rmtree(top)
    monkeypatch.setenv("MODELWELD_DVC_REPO", (tmp_path / "bare.git").as_uri())
    assert load(f"models:/{NAME}/1").predict(["purr"], params={"task": "animal"}).shape == (1, 2)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://ada:secret@example.org/ada/project.git", "https://example.org/ada/project.git"),
        ("https://ghp_secret@example.org:8443/p.git", "https://example.org:8443/p.git"),
        ("ssh://git@example.org/p.git", "ssh://git@example.org/p.git"),
        ("git@example.org:p.git", "git@example.org:p.git"),
    ],
)
def test_no_password_of_the_git_remote_reaches_mlflow(recorded: Recorded, url: str, told: str) -> None:
    run(recorded.root, "git", "remote", "add", "origin", url)
    try:
        assert registration_from_record(recorded.root, recorded.fair).address.url == told
    finally:
        run(recorded.root, "git", "remote", "remove", "origin")


@pytest.mark.parametrize("how", ["project", "url"])
def test_a_remote_without_the_weights_is_named(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    entered(recorded, recorded.fair)
    recorded.lose_weights()
    if how == "url":
        run(tmp_path, "git", "clone", "--quiet", "--bare", str(recorded.root), "bare.git")
        monkeypatch.setenv("MODELWELD_DVC_REPO", (tmp_path / "bare.git").as_uri())
    away = recorded.remote.rename(recorded.root / "away")
    try:
        with pytest.raises(RemoteUnavailable, match=r"neither the cache nor the remote|No such file.*\.dir"):
            load(f"models:/{NAME}/1")
        assert not list((Path(os.environ["MODELWELD_CACHE_DIR"]) / "models").glob("*/"))
    finally:
        shutil.rmtree(recorded.remote, ignore_errors=True)
        away.rename(recorded.remote)


def test_a_challenger_is_judged_again_when_the_champion_changed(recorded: Recorded) -> None:
    registry = opened(recorded)
    entered(recorded, recorded.fair)
    entered(recorded, recorded.better)
    promote(registry, "2", at=NOW, actor="ada")
    with pytest.raises(GateRefused, match="mean over 2 common tasks"):
        promote(registry, "1", at=NOW, actor="ada")


def test_an_alias_moved_by_hand_is_put_into_the_ledger(recorded: Recorded) -> None:
    registry = opened(recorded)
    entered(recorded, recorded.fair)
    registry.client.set_registered_model_alias(NAME, "champion", "1")
    entered(recorded, recorded.better)
    kinds = [event.kind for event in registry.ledger.events()]
    assert kinds == ["challenger", "observed", "challenger"]
    assert registry.ledger.events()[1].aliases == {"challenger": 1, "champion": 1}


def test_an_alias_in_another_case_is_refused(recorded: Recorded) -> None:
    registry = opened(recorded)
    entered(recorded, recorded.fair)
    registry.client.set_registered_model_alias(NAME, "Champion", "1")
    with pytest.raises(InputError, match="'Champion' differs from 'champion' by case only"):
        promote(registry, "1", at=NOW, actor="ada")


def test_unknown_versions_and_models_are_named(recorded: Recorded) -> None:
    registry = opened(recorded)
    with pytest.raises(InputError, match="no such registered model"):
        promote(registry, "1", at=NOW, actor="ada")
    entered(recorded, recorded.fair)
    for wanted, message in (("7", "there is no version 7"), ("champion", "no version or alias 'champion'")):
        with pytest.raises(InputError, match=message):
            aliases.resolve(registry.client, NAME, wanted)
    with pytest.raises(InputError, match="cannot promote to 'latest'"):
        promote(registry, "1", at=NOW, actor="ada", to="latest")


def test_the_newest_record_without_a_version_comes_first(recorded: Recorded) -> None:
    assert latest_unregistered(recorded.root) == recorded.bad
    entered(recorded, recorded.bad)
    assert latest_unregistered(recorded.root) == recorded.better
    entered(recorded, recorded.better)
    entered(recorded, recorded.fair)
    assert latest_unregistered(recorded.root) is None


def test_a_served_version_answers_over_http(recorded: Recorded) -> None:
    from fastapi.testclient import TestClient
    from mlflow.pyfunc.scoring_server import init

    entered(recorded, recorded.fair)
    client = TestClient(init(load(f"models:/{NAME}/1")))
    rows = {"dataframe_split": {"columns": ["text"], "data": [["the purr"], ["a moo"]]}, "params": {"task": "animal"}}
    answer = client.post("/invocations", json=rows)
    assert answer.status_code == 200, answer.text
    assert [set(row) for row in answer.json()["predictions"]] == [{"label", "confidence"}] * 2
    listed = client.post("/invocations", json={"inputs": ["the purr", "a moo"], "params": {"task": "animal"}})
    assert listed.json() == answer.json()


def test_who_acts(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_actor(recorded.root) == "ada"
    monkeypatch.delenv("MODELWELD_ACTOR")
    assert current_actor(recorded.root) == "Ada <ada@example.org>"


def test_an_unknown_record_is_refused(recorded: Recorded) -> None:
    with pytest.raises(WorkspaceError, match="no record"):
        registration_from_record(recorded.root, "merge-run/tiny/never")


def test_mlflow_out_of_reach_is_said_quickly(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(RegistryUnavailable, match="modelweld register"):
            entered(recorded, recorded.fair)
        assert time.monotonic() - begun < 10
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/at/all/mlflow.db")
    with pytest.raises(RegistryUnavailable, match="directory of MLflow's database is missing"):
        entered(recorded, recorded.fair)


def test_a_broken_database_is_said(recorded: Recorded, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(RegistryUnavailable, match="file is not a database"):
        entered(recorded, recorded.fair)


@pytest.mark.slow
def test_two_processes_that_register_one_record_make_one_version(recorded: Recorded) -> None:
    words = [sys.executable, "-c", REGISTER_ONE, str(recorded.root), recorded.fair]
    racers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [json.loads(racer.communicate(timeout=120)[0].splitlines()[-1]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(said) == [[1, False], [1, True]]
    assert [event.kind for event in opened(recorded).ledger.events()] == ["challenger"]


def test_a_promotion_waits_for_another_but_not_for_ever(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    entered(recorded, recorded.fair)
    monkeypatch.setattr("modelweld.registry.promotion.LOCK_TIMEOUT_S", 0.2)
    lock = FileLock(recorded.root / ".git" / "modelweld" / f"registry-{NAME}.lock")
    with lock, pytest.raises(WorkspaceError, match="another promotion or rollback has not ended"):
        promote(opened(recorded), "1", at=NOW, actor="ada")
    assert promote(opened(recorded), "1", at=NOW, actor="ada").after == {"champion": 1}


def test_audit_tells_one_story_and_notices_another(recorded: Recorded) -> None:
    registry = opened(recorded)
    entered(recorded, recorded.fair)
    promote(registry, "1", at=NOW, actor="ada")
    story = audit(registry, "champion", weights=True)
    assert story.consistent, story.document["checks"]
    assert [parent["name"] for parent in story.document["parents"]] == ["animal", "base", "colour"]
    assert [event["event"] for event in story.document["ledger"]] == ["challenger", "promoted"]
    json.dumps(story.document)

    registry.client.set_model_version_tag(NAME, "1", "modelweld.dvc.md5", "0" * 32 + ".dir")
    run(recorded.root, "git", "update-ref", f"refs/heads/{registry.ledger.branch}", f"{registry.ledger.branch}~1")
    wrong = {check["check"] for check in audit(registry, "1").document["checks"] if not check["ok"]}
    assert wrong == {
        "dvc.lock names the registered weights",
        "what MLflow would load points at the same weights",
        "the ledger holds the event that MLflow remembers",
        "the aliases stand where the ledger left them",
    }


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "modelweld", *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_commands(recorded: Recorded) -> None:
    refused = command("register", recorded.bad, "--json")
    assert refused.returncode == 1, refused.stderr
    assert json.loads(refused.stdout)["gate"]["verdict"] == "refused"
    done = command("register", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["record"] == recorded.better
    promoted = command("promote", "challenger", "--json")
    assert promoted.returncode == 0, promoted.stderr
    assert json.loads(promoted.stdout)["aliases"] == {"champion": 2}
    nothing = command("rollback")
    assert nothing.returncode == 2
    assert "no previous champion" in nothing.stderr
    told = command("audit", "champion")
    assert told.returncode == 0, told.stderr
    assert recorded.better in told.stdout


@pytest.mark.slow
def test_through_a_server(recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = ["--backend-store-uri", os.environ["MLFLOW_TRACKING_URI"], "--artifacts-destination", str(tmp_path / "art")]
    place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words = [sys.executable, "-m", "mlflow", "server", *store, *place]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        uri = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        wait_for(uri, tmp_path / "server.log")
        assert entered(recorded, recorded.fair).aliases == {"challenger": 1}
        assert entered(recorded, recorded.fair).registered.created is False
        registry = opened(recorded)
        promote(registry, "challenger", at=NOW, actor="ada")
        recorded.lose_weights()
        assert load(f"models:/{NAME}@champion").predict(["moo"], params={"task": "animal"}).shape == (1, 2)
        assert audit(registry, "champion").consistent
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)


def wait_for(uri: str, log: Path) -> None:
    import requests

    for _ in range(240):
        try:
            if requests.get(f"{uri}/health", timeout=2).ok:
                return
        except requests.exceptions.RequestException:
            time.sleep(0.5)
    pytest.fail(f"the server did not come up:\n{log.read_text()[-2000:]}")
