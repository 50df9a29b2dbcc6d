"""dvc:// from a real project with a real remote; models registered by pointer; the fetch stage under `dvc repro`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from modelweld.checkpoints import Checkpoint
from modelweld.config import Params
from modelweld.errors import SourceError, SourceUnavailable
from modelweld.formats import DvcAddress
from modelweld.sources import changes, fetch, pin, resolve
from modelweld.sources.remote_headers import read_remote_headers
from modelweld.sources.schemes import open_source


def run(where: Path, *words: str) -> str:
    command = [sys.executable, "-m", "dvc", *words[1:]] if words[0] == "dvc" else list(words)
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def write_model(path: Path, seed: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(seed).standard_normal((64, 64), dtype=np.float32)
    save_file({"w": weights}, path / "model.safetensors")
    (path / "config.json").write_text("{}")


def commit(zoo: Path, tag: str) -> str:
    run(zoo, "git", "add", "-A")
    run(zoo, "git", "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-qm", tag)
    run(zoo, "git", "-c", "user.name=t", "-c", "user.email=t@example.com", "tag", "-am", tag, tag)
    return run(zoo, "git", "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with models/a under DVC, pushed to its remote; tags v1 and merge-run/x/2, and a branch main."""
    root = tmp_path_factory.mktemp("dvc") / "zoo"
    root.mkdir()
    run(root, "git", "init", "-q", "-b", "main")
    run(root, "dvc", "init", "-q")
    run(root, "dvc", "remote", "add", "-d", "store", str(root.parent / "store"))
    for seed, tag in ((1, "v1"), (2, "merge-run/x/2")):
        write_model(root / "models/a", seed)
        run(root, "dvc", "add", "-q", "models/a")
        run(root, "dvc", "push", "-q")
        commit(root, tag)
    return root


def params(uri: str) -> Params:
    return Params.model_validate(
        {
            "name": "demo",
            "models": {"base": {"uri": uri}},
            "datasets": {},
            "tasks": {},
            "validate": {},
            "merge": {"method": "average"},
            "baselines": {},
            "evaluate": {},
        }
    )


def weights_of(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def expected(tmp_path: Path, seed: int) -> bytes:
    write_model(tmp_path / f"expected-{seed}", seed)
    return weights_of(tmp_path / f"expected-{seed}")


@pytest.mark.parametrize(("rev", "seed"), [("v1", 1), ("merge-run/x/2", 2), ("main", 2)])
def test_a_revision_is_pinned_to_its_commit_and_fetched(zoo: Path, tmp_path: Path, rev: str, seed: int) -> None:
    lock = pin(params(f"dvc://{zoo}@{rev}:models/a"), tmp_path)
    entry = lock.pinned["model-base"]
    assert entry.revision == run(zoo, "git", "rev-parse", f"{rev}^{{commit}}")
    assert entry.resolved == f"dvc://{zoo}@{entry.revision}:models/a"
    assert sorted(entry.files) == ["config.json", "model.safetensors"]
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert weights_of(tmp_path / "models/base") == expected(tmp_path, seed)


def test_a_clone_without_a_cache_reads_from_the_remote(zoo: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "-q", str(zoo), "clone")
    (tmp_path / "project").mkdir()
    entry = pin(params("dvc://../clone@v1:models/a"), tmp_path / "project").pinned["model-base"]
    fetch(entry, tmp_path / "project/models/base", tmp_path / "project")
    assert weights_of(tmp_path / "project/models/base") == expected(tmp_path, 1)


def test_a_git_address_is_cloned(zoo: Path, tmp_path: Path) -> None:
    entry = pin(params(f"dvc://file://{zoo}@v1:models/a"), tmp_path).pinned["model-base"]
    assert len(str(entry.revision)) == 40
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert weights_of(tmp_path / "models/base") == expected(tmp_path, 1)


def test_what_is_not_there_is_named(zoo: Path, tmp_path: Path) -> None:
    for uri, said in (
        (f"dvc://{zoo}@v9:models/a", "no revision 'v9'"),
        (f"dvc://{zoo}@v1:models/b", "models/b is not in"),
        ("dvc://nowhere", "is not dvc://repo@rev:path"),
    ):
        with pytest.raises(SourceError, match=said):
            resolve(params(uri), tmp_path)
    with pytest.raises(SourceUnavailable, match="cannot be cloned"):
        resolve(params(f"dvc://file://{tmp_path}/nowhere@main:models/a"), tmp_path)


def test_a_version_registered_by_pointer_is_its_dvc_address(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("merged")
    tags = {"repo": str(zoo), "rev": "merge-run/x/2", "path": "models/a", "md5": "-", "manifest_sha256": "-"}
    client.create_model_version(
        "merged",
        source=(tmp_path / "thin").as_uri(),
        tags={f"modelweld.dvc.{key}": value for key, value in tags.items()},
    )
    client.set_registered_model_alias("merged", "champion", "1")
    entry = pin(params("models:/merged@champion"), tmp_path).pinned["model-base"]
    assert entry.resolved == f"dvc://{zoo}@{entry.revision}:models/a"
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert weights_of(tmp_path / "models/base") == expected(tmp_path, 2)


def test_a_version_of_a_project_below_the_top_is_found_by_its_remote_url(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.create_registered_model("merged")
    away = DvcAddress(
        repo="/nowhere/models",
        rev="merge-run/x/2",
        path="a",
        md5="-",
        manifest_sha256="-",
        url=f"file://{zoo}",
        folder="models/",
    )
    client.create_model_version("merged", source=(tmp_path / "thin").as_uri(), tags=away.tags())
    entry = pin(params("models:/merged/1"), tmp_path).pinned["model-base"]
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert weights_of(tmp_path / "models/base") == expected(tmp_path, 2)


def test_dvc_repro_runs_the_stage_and_only_for_what_changed(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "expert")):
        write_model(tmp_path / "up" / name, seed)
    two = Params.model_validate(
        {
            "name": "demo",
            "models": {"base": {"uri": "up/base"}, "expert": {"uri": "up/expert"}},
            "datasets": {},
            "tasks": {},
            "validate": {},
            "merge": {"method": "average"},
            "baselines": {},
            "evaluate": {},
        }
    )
    lock = pin(two, tmp_path)
    shipped = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text())
    stage = shipped["stages"]["fetch"]
    stage["do"]["cmd"] = f"{sys.executable} -m {stage['do']['cmd']}"
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"vars": ["sources.lock.json"], "stages": {"fetch": stage}}))
    run(tmp_path, "dvc", "init", "-q", "--no-scm")
    run(tmp_path, "dvc", "repro")
    assert weights_of(tmp_path / "models/base") == weights_of(tmp_path / "up/base")
    write_model(tmp_path / "up/expert", 7)
    assert [change.what for change in changes(lock, pin(two, tmp_path, lock))] == ["same", "moved"]
    said = run(tmp_path, "dvc", "repro")
    assert "Stage 'fetch@model-base' didn't change, skipping" in said
    assert "Running stage 'fetch@model-expert'" in said
    assert weights_of(tmp_path / "models/expert") == weights_of(tmp_path / "up/expert")


def test_headers_are_read_from_a_remote(zoo: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "-q", str(zoo), "clone")
    upstream = open_source("dvc://clone@v1:models/a", tmp_path, "models.base.uri")
    read_remote_headers(upstream, upstream.resolve().files, tmp_path / "seen")
    with Checkpoint.open(tmp_path / "seen") as seen:
        assert seen.tensors["w"].shape == (64, 64)
    assert weights_of(tmp_path / "seen") != expected(tmp_path, 1)
