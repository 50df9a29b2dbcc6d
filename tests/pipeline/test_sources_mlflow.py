"""models:/ from a sqlite registry and through a tracking server, and models that modelweld registered by pointer."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from modelweld.config import Params
from modelweld.errors import SourceError, SourceUnavailable
from modelweld.sources import changes, fetch, pin, resolve


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


def model_at(path: Path, seed: int = 0) -> Path:
    path.mkdir(parents=True)
    save_file(
        {"w": np.random.default_rng(seed).standard_normal((64, 64), dtype=np.float32)}, path / "model.safetensors"
    )
    (path / "config.json").write_text("{}")
    return path


def read(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def register(tracking_uri: str, directory: Path, layout: dict[str, Path], alias: str = "champion") -> str:
    """The id of the logged model behind a new version of `demo`; it holds the directories of `layout` at their keys."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    experiment = client.get_experiment_by_name("weld")
    if experiment is None:
        location = None if tracking_uri.startswith("http") else (directory / "artifacts").as_uri()
        experiment = client.get_experiment(client.create_experiment("weld", artifact_location=location))
    model = client.create_logged_model(experiment.experiment_id, name="demo")
    for folder, source in layout.items():
        staged = directory / f"staged-{model.model_id}" / folder
        staged.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, staged, dirs_exist_ok=True)
    client.log_model_artifacts(model.model_id, str(directory / f"staged-{model.model_id}"))
    client.finalize_logged_model(model.model_id, "READY")
    try:
        client.create_registered_model("demo")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # With `model_id`, MLflow looks the model up at its process-wide address, whatever the client's.
    with _use_tracking_uri(tracking_uri):
        version = client.create_model_version("demo", source=f"models:/{model.model_id}", model_id=model.model_id)
    client.set_registered_model_alias("demo", alias, version.version)
    return str(model.model_id)


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_an_alias_is_pinned_to_its_version_and_fetched(database: str, tmp_path: Path) -> None:
    first = register(database, tmp_path, {".": model_at(tmp_path / "one", 1)})
    expected = read(tmp_path / f"staged-{first}")
    by_alias = params("models:/demo@champion")
    lock = pin(by_alias, tmp_path)
    entry = lock.pinned["model-base"]
    assert (entry.resolved, entry.revision) == ("models:/demo/1", first)
    assert resolve(params("models:/demo/1"), tmp_path).pinned["model-base"].files == entry.files
    assert resolve(by_alias, tmp_path, lock) == lock
    second = register(database, tmp_path, {".": model_at(tmp_path / "two", 2)})
    moved = changes(lock, resolve(by_alias, tmp_path, lock))
    assert [(c.what, c.after) for c in moved] == [("moved", f"models:/demo/2 ({second})")]
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert read(tmp_path / "models/base") == expected
    for uri in ("models:/demo@nobody", "models:/demo/9", "models:/nothing/1"):
        with pytest.raises(SourceError, match="not in the registry"):
            resolve(params(uri), tmp_path)


def test_the_transformers_flavour_is_read_as_its_hugging_face_directory(database: str, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    flavour = tmp_path / "flavour"
    flavour.mkdir()
    (flavour / "MLmodel").write_text("flavors: {}")
    (flavour / "requirements.txt").write_text("mlflow")
    register(
        database,
        tmp_path,
        {".": flavour, "model": model_at(tmp_path / "one"), "components/tokenizer": tokenizer},
    )
    entry = pin(params("models:/demo@champion"), tmp_path).pinned["model-base"]
    assert sorted(entry.files) == ["config.json", "model.safetensors", "tokenizer.json"]
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert sorted(read(tmp_path / "models/base")) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_without_a_registry_it_says_which_variable_to_set(database: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no MLflow here") as caught:
        resolve(params("models:/demo@champion"), tmp_path)
    assert "MLFLOW_TRACKING_URI" in str(caught.value.hint)
    assert not (tmp_path / "mlflow.db").exists()
    with pytest.raises(SourceError, match="names no version"):
        resolve(params("models:/demo"), tmp_path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--serve-artifacts"]
    places = ["--backend-store-uri", f"sqlite:///{root}/mlflow.db", "--artifacts-destination", str(root / "artifacts")]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, *places],
            cwd=root,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):  # noqa: S310
                    break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


@pytest.mark.slow
def test_through_a_server(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = register(server, tmp_path, {".": model_at(tmp_path / "one", 1)})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    entry = pin(params("models:/demo@champion"), tmp_path).pinned["model-base"]
    assert (entry.resolved, entry.revision) == ("models:/demo/1", version)
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert read(tmp_path / "models/base") == read(tmp_path / f"staged-{version}")
    assert not list((tmp_path / ".modelweld/staging").glob("mlflow-*"))


def test_a_server_that_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(SourceUnavailable, match="did not answer"):
        resolve(params("models:/demo@champion"), tmp_path)
