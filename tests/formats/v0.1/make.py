"""Write the frozen documents of release 0.1 into this folder. It must be run with that release, commit 1055088:

    git worktree add --detach ../release-0.1 1055088
    PYTHONPATH=../release-0.1/src:../release-0.1 python tests/formats/v0.1/make.py

Running it again gives the same documents in kind, not in bytes: run ids, times and commits differ. The folder is
frozen: run it to see how the documents were made, never to make a failing test pass.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import modelweld

RELEASE = "1055088"
HERE = Path(__file__).resolve().parent
# A fixed place, because documents hold the paths of the project; restoring them elsewhere replaces it.
ROOT = Path("/tmp/modelweld-v0.1")  # noqa: S108
PROJECT = ROOT / "project"
NAME = "tiny"


def run(*command: str, code: int = 0) -> str:
    """What a command printed in the project; every command is one of the release, found by PYTHONPATH."""
    unset = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI", "MODELWELD_PROJECT_ROOT")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"MODELWELD_CACHE_DIR": str(ROOT / "cache"), "MODELWELD_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    print(f"{done.returncode} {' '.join(command[-3:])}", flush=True)  # noqa: T201
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def weld(*words: str, code: int = 0) -> str:
    return run(sys.executable, "-m", "modelweld", *words, code=code)


def build() -> None:
    """A base of two layers and two experts of it, with their data; the release's own maker of tiny families."""
    from tests.conftest import build_family

    build_family(ROOT / "family", hidden=8, layers=2)


def reorder_units(task: str) -> None:
    """Give the units of an expert another order: the same function with other weights, for an alignment to undo."""
    from transformers import BertForSequenceClassification

    from modelweld.symmetry import derive_spec

    folder = ROOT / "family" / "models" / task
    model = BertForSequenceClassification.from_pretrained(folder)
    spec = derive_spec(model.config)
    model.load_state_dict(spec.apply(model.state_dict(), spec.random(1)))
    model.save_pretrained(folder)


def params(**changes: Any) -> None:
    """Commit a params.yaml over the family, in the words of the release."""
    family = ROOT / "family"
    tasks = {"colour": "colour", "animal": "animal"}
    document = {
        "name": NAME,
        "models": {name: {"uri": str(family / "models" / name), "licence": "apache-2.0"} for name in ("base", *tasks)},
        "datasets": {task: {"uri": str(family / "datasets" / task), "licence": "cc0-1.0"} for task in tasks},
        "tasks": {task: {"model": task, "dataset": task, "max_length": 16} for task in tasks},
        "validate": {"min_rows": 50},
        "merge": {"method": "drm", "direction": "horizontal", "drop_rate": 0.5},
        "baselines": {"average": {"method": "average"}},
        "evaluate": {"bootstrap": 50},
        "register": {"min_relative": 0.0},
    }
    (PROJECT / "params.yaml").write_text(json.dumps(document | changes, indent=2) + "\n")
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "--message", "Change the parameters")


def begin() -> None:
    PROJECT.mkdir(parents=True)
    weld("init")
    run("git", "config", "user.name", "Ada")
    run("git", "config", "user.email", "ada@example.org")


def live() -> None:
    """Three versions, and every kind of event of the ledger."""
    params()
    weld("run")
    weld("promote", "challenger")
    params(merge={"method": "task_arithmetic", "scale": 0.5}, register={"min_relative": 2.0})
    weld("run", code=1)
    weld("promote", "2", "--override", "to see what overriding leaves behind")
    reorder_units("animal")
    align = {"rows": 32, "max_length": 16, "alpha": "auto", "grid": [0.5, 1.0], "validation_rows": 20}
    params(merge={"method": "mudsc", "align": align}, register={"min_relative": 0.0, "champion_margin": 1.0})
    weld("run")
    weld("promote", "3")
    weld("rollback", "--reason", "version 3 was a trial")
    move_by_hand("champion", "1")
    weld("promote", "3")
    for version in ("1", "2", "3"):
        weld("audit", version, "--weights")


def move_by_hand(alias: str, version: str) -> None:
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{PROJECT / 'mlflow.db'}").set_registered_model_alias(NAME, alias, version)


def freeze() -> None:
    """Copy every document out of the project."""
    tags = run("git", "tag", "--list", "--sort=creatordate").split()
    for folder, tag in zip(("plain", "refused", "aligned"), tags, strict=True):
        place = HERE / folder
        for path in run("git", "ls-tree", "-r", "--name-only", tag).split():
            if path in ("sources.lock.json", "validation/gate.json") or path.startswith("scores/"):
                write(place / path, run("git", "show", f"{tag}:{path}"))
        write(place / "record.txt", run("git", "for-each-ref", "--format=%(contents)", f"refs/tags/{tag}"))
        merged = place / "merged"
        run(sys.executable, "-m", "dvc", "get", ".", "merged", "--rev", tag, "--out", str(ROOT / folder))
        merged.mkdir(parents=True)
        for file in ("manifest.json", "alignment.json"):
            if (ROOT / folder / file).exists():
                shutil.copyfile(ROOT / folder / file, merged / file)
    write(HERE / "ledger" / "events.jsonl", run("git", "show", f"modelweld/ledger/{NAME}:events.jsonl"))
    run("git", "bundle", "create", str(HERE / "project.bundle"), "--all")
    copy(PROJECT / ".modelweld" / "dvc-remote", HERE / "dvc-remote")
    copy(PROJECT / ".modelweld" / "mlflow", HERE / "mlflow")
    for pointer in (HERE / "mlflow").rglob("MLmodel"):
        # It names the folder that the release was run from.
        write(pointer, pointer.read_text().replace(str(Path(modelweld.__file__).parents[2]), "/opt/release-0.1"))
    with sqlite3.connect(PROJECT / "mlflow.db") as database:
        write(HERE / "mlflow.sql", "\n".join(database.iterdump()) + "\n")
    write(HERE / "mlflow.json", json.dumps(told_to_mlflow(), indent=1, sort_keys=True) + "\n")


def freeze_refused_gate() -> None:
    """The gate file of a run that validation refuses: its test rows are too few."""
    params(validate={"min_rows": 500})
    weld("pin")
    run(sys.executable, "-m", "dvc", "repro", "--quiet", "validate", code=255)
    write(HERE / "gate-refused.json", (PROJECT / "validation" / "gate.json").read_text())


def told_to_mlflow() -> dict[str, Any]:
    """Tags, parameters, parents and the pointer of every version, as MLflow's client gives them."""
    import yaml
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{PROJECT / 'mlflow.db'}")
    found: dict[str, Any] = {}
    for version in client.search_model_versions(f"name = '{NAME}'"):
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


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("tmp"))
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def main() -> None:
    source = Path(modelweld.__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=source, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert commit == RELEASE, (
        f"modelweld of {commit} is on the path ({source}); run this with {RELEASE}, as it says above"
    )
    assert {path.name for path in HERE.iterdir()} <= {"make.py", "README.md"}, "frozen already: remove it to try again"
    shutil.rmtree(ROOT, ignore_errors=True)
    build()
    begin()
    live()
    freeze()
    freeze_refused_gate()


if __name__ == "__main__":
    main()
