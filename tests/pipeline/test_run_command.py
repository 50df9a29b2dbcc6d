"""`modelweld run` as its users meet it: real checkpoints, embedded Prefect, sqlite MLflow, every interruption.

The tests of the module go on in one project, in their order, as a person would.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from modelweld.workspace import Project
from tests.conftest import build_family, pipeline_params
from tests.support.command import MODELWELD, answer, clean_environment, git, modelweld
from tests.support.toy import Toy, make_toy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project as `modelweld init` makes it, over a family of its own, committed."""
    root = tmp_path_factory.mktemp("run") / "project"
    family = build_family(root.parent / "family")
    root.mkdir()
    modelweld(root, "init")
    git(root, "config", "user.email", "ada@example.org")
    git(root, "config", "user.name", "Ada")
    (root / "params.yaml").write_text(pipeline_params(family, validate={}))
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    return root


def test_registry_away_keeps_the_merge_and_register_finishes_it(home: Path) -> None:
    done = modelweld(home, "run", code=3, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    project = Project.find(home)
    (record,) = project.records("tiny")
    assert f"the merge is kept as {record.tag}" in done.stderr
    assert "evaluate: 2 ran" in done.stderr
    assert project.missing_steps(record) == ("register",)
    assert json.loads(record.read("validation/gate.json"))["verdict"] == "pass"
    assert set(json.loads(record.read("scores/animal.json"))["systems"]) >= {"base", "expert", "merged", "average"}
    finished = modelweld(home, "register", record.tag)
    assert "models:/tiny/1" in finished.stdout
    assert project.unfinished() == []
    assert git(home, "status", "--porcelain") == ""


def test_nothing_changed(home: Path) -> None:
    done = answer(modelweld(home, "run", "--json"))
    assert done["status"] == "unchanged"
    assert len(Project.find(home).records()) == 1


def test_the_lock_is_that_of_pin_and_repro_by_hand(home: Path, tmp_path: Path) -> None:
    git(home, "clone", "--quiet", str(home), str(tmp_path / "clone"))
    modelweld(tmp_path / "clone", "pin")
    subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=tmp_path / "clone", env=clean_environment(), check=True, timeout=500
    )
    (record,) = Project.find(home).records()
    assert (tmp_path / "clone" / "dvc.lock").read_bytes() == record.read("dvc.lock")
    assert (tmp_path / "clone" / "sources.lock.json").read_bytes() == record.read("sources.lock.json")


def test_a_dirty_tree_is_refused_at_once(home: Path) -> None:
    before = (home / "params.yaml").read_text()
    (home / "params.yaml").write_text(json.dumps(json.loads(before) | {"evaluate": {"bootstrap": 60}}))
    started = time.monotonic()
    done = modelweld(home, "run", code=2)
    assert "changed but not committed: params.yaml" in done.stderr
    assert "--allow-dirty" in done.stderr
    assert time.monotonic() - started < 10, "before Prefect is started"
    allowed = answer(modelweld(home, "run", "--json", "--allow-dirty", "--no-register"))
    assert allowed["record"]["dirty"] is True
    assert [stage for repro in allowed["stages"] for stage in repro["ran"]] == ["evaluate@colour", "evaluate@animal"]
    (home / "params.yaml").write_text(before)


def test_one_changed_expert(home: Path) -> None:
    family = home.parent / "family" / "models" / "animal"
    other = home.parent / "other" / "models" / "animal"
    build_family(home.parent / "other", seed=7)
    shutil.copy(other / "config.json", family / "config.json")
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(family / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    generator = torch.Generator().manual_seed(3)
    weights[name] = weights[name] + 0.001 * torch.randn(weights[name].shape, generator=generator)
    save_file(weights, family / "model.safetensors", metadata={"format": "pt"})
    done = answer(modelweld(home, "run", "--json"))
    ran = [stage for repro in done["stages"] for stage in repro["ran"]]
    assert ran == ["fetch@model-animal", "validate", "merge", "baselines", "evaluate@colour", "evaluate@animal"]
    assert done["registered"]["version"] == 2


def test_a_gate_that_refuses_ends_with_1_and_no_record(home: Path) -> None:
    params = yaml.safe_load((home / "params.yaml").read_text())
    before = (home / "params.yaml").read_text()
    (home / "params.yaml").write_text(json.dumps(params | {"validate": {"min_rows": 100_000}}))
    git(home, "commit", "--quiet", "--all", "--message", "ask for more")
    known = len(Project.find(home).records())
    done = modelweld(home, "run", code=1)
    assert "error: stage validate" in done.stderr
    assert len(Project.find(home).records()) == known
    (home / "params.yaml").write_text(before)
    git(home, "commit", "--quiet", "--all", "--message", "be content")


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return make_toy(tmp_path / "project")


@pytest.mark.parametrize("stage", ["fetch@model-a", "validate", "merge", "evaluate@b"])
def test_kill_9_at_a_stage(toy: Toy, stage: str) -> None:
    child = start(toy, stage)
    assert processes_of(toy)
    child.send_signal(signal.SIGKILL)
    child.wait()
    wait_for(lambda: not processes_of(toy))
    (toy.root / "orders" / f"{stage}.sleep").unlink()
    done = answer(modelweld(toy.root, "run", "--json", "--frozen", "--no-register"))
    assert done["status"] == "recorded"
    assert toy.ran()[0] == stage, "what was finished before the kill is not done again"


def test_ctrl_c_at_a_stage(toy: Toy) -> None:
    child = start(toy, "merge")
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=120) == 130
    (toy.root / "orders" / "merge.sleep").unlink()
    shown = modelweld(toy.root, "run", "--frozen", "--no-register").stdout
    assert toy.ran()[0] == "merge"
    home = toy.root / ".modelweld" / "prefect"
    assert f"PREFECT_HOME={home} prefect server start" in shown, "the server of the run is gone, its history is there"


def start(toy: Toy, stage: str) -> subprocess.Popen[bytes]:
    """`modelweld run`, now inside `stage`, in a process group of its own as a shell gives it."""
    toy.order(stage, "sleep", "600")
    child = subprocess.Popen(
        [MODELWELD, "run", "--frozen", "--no-register"],
        cwd=toy.root,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    log = toy.root / "orders" / "ran.txt"
    wait_for(lambda: child.poll() is not None or (log.exists() and log.read_text().split()[-1:] == [stage]))
    assert child.poll() is None, "it ended early"
    toy.ran()
    return child


def processes_of(toy: Toy) -> list[str]:
    """Stages and servers of the project: the processes that work somewhere in its .modelweld."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if str(link.readlink()).startswith(str(toy.root / ".modelweld")):
                found.append(link.parent.name)
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("make", "said", "hint"),
    [
        (lambda root: None, "not in a git repository", "git init"),
        (lambda root: git(root, "init", "--quiet"), "DVC is not initialised", "modelweld init"),
        (lambda root: modelweld(root, "init"), "no commit yet", "git commit"),
    ],
)
def test_what_is_no_project(tmp_path: Path, make: Callable[[Path], object], said: str, hint: str) -> None:
    make(tmp_path)
    done = modelweld(tmp_path, "run", code=2)
    assert said in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.exists(tmp_path / ".modelweld" / "prefect")
