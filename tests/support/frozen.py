"""Projects frozen by an earlier release, restored: git from a bundle, the DVC remote, MLflow from SQL."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from modelweld.workspace import Project, materialise

FROZEN_AT = "/tmp/modelweld-v0.1/project"  # noqa: S108 - the place that the documents name, not one that is used


def restore(frozen: Path, project: Path) -> Path:
    """The project that `frozen` holds, at `project`: its branches, records, remote, MLflow and artifacts."""
    project.mkdir(parents=True)
    git(project, "init", "--quiet", "--initial-branch=restored")
    git(project, "fetch", "--quiet", str(frozen / "project.bundle"), "refs/*:refs/*")
    git(project, "checkout", "--quiet", "master")
    shutil.copytree(frozen / "dvc-remote", project / ".modelweld" / "dvc-remote")
    shutil.copytree(frozen / "mlflow", project / ".modelweld" / "mlflow")
    for pointer in (project / ".modelweld" / "mlflow").rglob("MLmodel"):
        pointer.write_text(moved(pointer.read_text(encoding="utf-8"), project), encoding="utf-8")
    with sqlite3.connect(project / "mlflow.db") as database:
        database.executescript(moved((frozen / "mlflow.sql").read_text(encoding="utf-8"), project))
    database.close()
    return project


def moved(text: str, project: Path) -> str:
    """The text with the frozen project's place replaced by `project`."""
    return text.replace(FROZEN_AT, str(project))


def git(where: Path, *words: str, stdin: str | None = None) -> str:
    """What git printed."""
    done = subprocess.run(["git", *words], cwd=where, input=stdin, capture_output=True, text=True, check=True)
    return done.stdout


def keys_of(value: Any, path: str = "") -> set[str]:
    """Every key of a JSON value by its path, such as `parents.base.source`; the entries of a list are one, `[]`."""
    if isinstance(value, dict):
        below = ((f"{path}.{key}" if path else key, item) for key, item in value.items())
        return {name for key, item in below for name in {key, *keys_of(item, key)}}
    if isinstance(value, list):
        return keys_of_all(value, f"{path}[]")
    return set()


def keys_of_all(values: Iterable[Any], path: str = "") -> set[str]:
    """The keys of all the values together."""
    return {name for value in values for name in keys_of(value, path)}


def fetched(project: Path, tag: str, place: Path, *outs: str) -> Path:
    """The params.yaml in `place`, with the models and data of a record beside it, and its other `outs`."""
    found = Project.find(project)
    document = yaml.safe_load(found.record(tag).read("params.yaml"))
    for kind in ("models", "datasets"):
        for name, source in document[kind].items():
            source["uri"] = str(materialise(found, tag, f"{kind}/{name}", place / kind / name))
    for out in outs:
        materialise(found, tag, out, place / out)
    params = place / "params.yaml"
    params.write_text(json.dumps(document), encoding="utf-8")
    return params


def told_to_mlflow(uri: str, name: str) -> dict[str, Any]:
    """Tags, parameters, parents and the pointer of every version, as MLflow's client gives them."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found: dict[str, Any] = {}
    for version in client.search_model_versions(f"name = '{name}'"):
        story = client.get_run(version.run_id)
        pointer = client.get_logged_model(version.tags["modelweld.model_id"])
        flavors = yaml.safe_load((Path(pointer.artifact_location.removeprefix("file://")) / "MLmodel").read_text())
        parents = [client.get_logged_model(item.model_id) for item in story.inputs.model_inputs]
        found[str(version.version)] = {
            "tags": dict(version.tags),
            "run": {"tags": dict(story.data.tags), "params": dict(story.data.params), "metrics": story.data.metrics},
            "pointer": {"tags": dict(pointer.tags), "params": dict(pointer.params), "type": pointer.model_type},
            "model_config": flavors["flavors"]["python_function"]["config"],
            "inputs": [{"name": p.name, "type": p.model_type, "tags": p.tags, "params": p.params} for p in parents],
        }
    return found
