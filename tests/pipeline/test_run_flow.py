"""The flow over a project whose stages take no time: what runs, what is tried again, what its pages show."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from modelweld.errors import (
    ExternalError,
    GateRefused,
    InputError,
    ModelweldError,
    RemoteUnavailable,
    WorkspaceError,
)
from modelweld.workspace import Project
from tests.support.toy import Toy, make_toy

pytestmark = pytest.mark.slow

ALL = [
    *("fetch@dataset-a", "fetch@dataset-b", "fetch@model-a", "fetch@model-b", "fetch@model-base"),
    *("validate", "merge", "baselines", "evaluate@a", "evaluate@b"),
]


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, dict[str, Any]]:
    """A project after its first run: copied, not changed, by the tests."""
    toy = make_toy(tmp_path_factory.mktemp("finished") / "project")
    return toy, run(toy)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return make_toy(tmp_path / "project")


@pytest.fixture
def again(finished: tuple[Toy, dict[str, Any]], tmp_path: Path) -> Toy:
    """A copy of the finished project, with an empty log of stages."""
    toy, _ = finished
    shutil.copytree(toy.root, tmp_path / "project", symlinks=True)
    shutil.copytree(toy.remote, tmp_path / "project-remote")
    copy = Toy(tmp_path / "project", tmp_path / "project-remote")
    copy.ran()
    return copy


def run(toy: Toy, **options: Any) -> dict[str, Any]:
    from modelweld.flows.merge import merge

    chosen = {"frozen": True, "to_registry": False, "retry_delays_s": (0.0, 0.0), **options}
    done: dict[str, Any] = merge(project=str(toy.root), **chosen)
    return done


def task_states(flow_run_id: str) -> dict[str, str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run_id)]))
    with get_client(sync_client=True) as client:
        return {run.name: str(run.state_name) for run in client.read_task_runs(flow_run_filter=wanted)}


def test_the_flow_is_the_graph_of_dvc_yaml(finished: tuple[Toy, dict[str, Any]]) -> None:
    toy, done = finished
    assert done["status"] == "recorded"
    assert [stage for repro in done["stages"] for stage in repro["ran"]] == ALL
    states = task_states(done["record"]["flow_run_id"])
    assert states == dict.fromkeys(
        ["pin", "fetch", "validate", "merge", "baselines", "evaluate", "record", "push"], "Completed"
    ) | {"register": "Completed"}
    assert list(toy.remote.rglob("*.dir")), "pushed"
    assert Project.find(toy.root).runs() == []


def test_the_stages_lines_and_the_scores_are_on_its_pages(finished: tuple[Toy, dict[str, Any]]) -> None:
    from prefect.artifacts import Artifact
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    _, done = finished
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(done["record"]["flow_run_id"])]))
    with get_client(sync_client=True) as client:
        lines = [log.message for log in client.read_logs(log_filter=wanted, limit=200)]
    assert "at work on evaluate@a" in lines
    assert not [line for line in lines if "git add dvc.lock" in line]
    table = Artifact.get("scores-toy")
    if asyncio.iscoroutine(table):
        table = asyncio.run(table)
    rows = json.loads(table.data)
    assert {(row["task"], row["system"]) for row in rows} == {
        (task, system) for task in "ab" for system in ("base", "expert", "merged", "average")
    }


def test_nothing_changed_runs_nothing_and_says_since_when(again: Toy, finished: tuple[Toy, dict[str, Any]]) -> None:
    done = run(again)
    assert (done["status"], done["stages"]) == ("unchanged", [])
    assert done["record"]["tag"] == finished[1]["record"]["tag"]
    assert again.ran() == []
    assert len(Project.find(again.root).records()) == 1


def test_one_changed_expert_redoes_only_what_depends_on_it(again: Toy) -> None:
    again.pin(model_b="b-2")
    done = run(again)
    assert again.ran() == ["fetch@model-b", "validate", "merge", "baselines", "evaluate@a", "evaluate@b"]
    assert done["record"]["tag"] != Project.find(again.root).records()[-1].tag


def test_a_changed_setting_redoes_only_what_reads_it(again: Toy) -> None:
    again.change_params(evaluate={"bootstrap": 2})
    again.commit()
    run(again)
    assert again.ran() == ["evaluate@a", "evaluate@b"]


def test_a_fresh_clone_with_the_tags_goes_on_from_the_remote(again: Toy, tmp_path: Path) -> None:
    again.git("clone", "--quiet", str(again.root), str(tmp_path / "clone"))
    clone = Toy(tmp_path / "clone", again.remote)
    (clone.root / "orders").mkdir()
    clone.dvc("remote", "modify", "--local", "store", "url", str(again.remote))
    assert run(clone)["status"] == "unchanged"
    clone.change_params(evaluate={"bootstrap": 2})
    clone.git("config", "user.email", "ada@example.org")
    clone.git("config", "user.name", "Ada")
    clone.commit()
    run(clone)
    assert clone.ran() == ["evaluate@a", "evaluate@b"], "the rest came from the remote"


def test_an_outside_failure_is_tried_again(again: Toy) -> None:
    again.pin(model_b="b-3")
    again.order("fetch@model-b", "exit", "3 3 0")
    assert run(again)["status"] == "recorded"
    assert again.ran().count("fetch@model-b") == 3


@pytest.mark.parametrize(("code", "kind"), [("1", GateRefused), ("2", InputError)])
def test_a_refusal_and_bad_input_are_not(again: Toy, code: str, kind: type[ModelweldError]) -> None:
    again.change_params(validate={"min_rows": 3})
    again.commit()
    again.order("validate", "exit", f"{code} 0")
    with pytest.raises(kind) as error:
        run(again)
    assert (error.value.what, error.value.where) == ("validate was told to fail", "stage validate: models/a")
    assert again.ran() == ["validate"]
    (kept,) = Project.find(again.root).runs()
    assert not kept.alive
    assert kept.path.is_dir()
    assert run(again)["status"] == "recorded"


def test_it_gives_up_after_its_retries_and_the_next_run_goes_on(again: Toy) -> None:
    again.pin(model_b="b-4")
    again.order("merge", "exit", "3 3 3")
    with pytest.raises(ExternalError):
        run(again)
    again.ran()
    assert run(again)["status"] == "recorded"
    assert again.ran() == ["merge", "baselines", "evaluate@a", "evaluate@b"], "what was done is not done again"


def test_a_run_that_died_is_reported_as_crashed(again: Toy) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    @flow
    def died() -> None:
        pass

    with get_client(sync_client=True) as client:
        zombie = client.create_flow_run(died, state=Running())
    folder = again.root / ".modelweld" / "runs"
    (folder / "20260101T000000Z-aaaaaa").mkdir(parents=True)
    note = {"run_id": "20260101T000000Z-aaaaaa", "flow_run_id": str(zombie.id), "pid": 1}
    (folder / "20260101T000000Z-aaaaaa.json").write_text(json.dumps(note))
    run(again)
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(zombie.id).state
    assert state
    assert state.is_crashed()
    assert "20260101T000000Z-aaaaaa" in str(state.message)


def test_a_remote_out_of_reach_keeps_the_merge_and_the_next_run_pushes_it(again: Toy) -> None:
    shutil.rmtree(again.remote)
    again.remote.write_text("a file where a folder should be")
    again.pin(model_a="a-5")
    with pytest.raises(RemoteUnavailable) as error:
        run(again)
    project = Project.find(again.root)
    newest = project.records()[0]
    assert error.value.hint
    assert f"modelweld register {newest.tag}" in error.value.hint
    assert project.missing_steps(newest) == ("push",)
    again.ran()
    again.remote.unlink()
    assert run(again)["status"] == "unchanged"
    assert again.ran() == []
    assert project.missing_steps(newest) == ()
    assert list(again.remote.rglob("*.dir"))


def test_frozen_needs_a_lock(toy: Toy) -> None:
    (toy.root / "sources.lock.json").unlink()
    with pytest.raises(WorkspaceError, match=r"needs sources\.lock\.json"):
        run(toy)


def test_frozen_without_a_lock_of_ones_own_takes_the_last_records(again: Toy) -> None:
    (again.root / "sources.lock.json").unlink()
    assert run(again)["status"] == "unchanged"
