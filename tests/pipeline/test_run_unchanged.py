"""A run that has nothing to do: told from git and DVC alone, without a Prefect server, and never told wrongly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from modelweld.errors import SourceError
from modelweld.flows.unchanged import unchanged_since
from modelweld.workspace import Project
from tests.support.command import answer, modelweld
from tests.support.toy import Toy, make_toy


@pytest.fixture(scope="module")
def ran_once(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A project with one record, made without Prefect."""
    toy = make_toy(tmp_path_factory.mktemp("ran") / "project")
    with Project.find(toy.root).worktree() as tree:
        shutil.copy(toy.root / "sources.lock.json", tree.path)
        for group in tree.groups():
            tree.repro(group)
        tree.record()
    return toy


@pytest.fixture
def toy(ran_once: Toy, tmp_path: Path) -> Toy:
    shutil.copytree(ran_once.root, tmp_path / "project", symlinks=True)
    shutil.copytree(ran_once.root / ".dvc" / "cache", tmp_path / "project-remote", dirs_exist_ok=True)
    copy = Toy(tmp_path / "project", tmp_path / "project-remote")
    copy.ran()
    return copy


@pytest.mark.slow
def test_the_command_says_so_and_starts_no_server(toy: Toy) -> None:
    done = answer(modelweld(toy.root, "run", "--json", "--frozen", "--no-register"))
    (record,) = Project.find(toy.root).records()
    assert (done["status"], done["stages"], done["registered"]) == ("unchanged", [], None)
    assert done["record"]["tag"] == record.tag
    assert {row["task"] for row in done["scores"]} == {"a", "b"}
    assert not (toy.root / ".modelweld" / "prefect").exists()
    assert toy.ran() == []
    assert toy.git("worktree", "list").count("\n") == 1
    assert Project.find(toy.root).runs() == []


@pytest.mark.slow
def test_what_may_need_work_is_left_to_the_flow(toy: Toy) -> None:
    project = Project.find(toy.root)
    record = unchanged_since(project, frozen=True)
    assert record == project.latest_record()
    assert record

    project.mark_unfinished(record, ("push",))
    assert unchanged_since(project, frozen=True) is None
    project.mark_done(record, "push")

    toy.pin(model_b="b-2")
    assert unchanged_since(project, frozen=True) is None, "another revision is pinned"
    toy.pin()

    folder = toy.root / ".modelweld" / "runs"
    note = folder / "20260101T000000Z-aaaaaa.json"
    note.write_text('{"run_id": "20260101T000000Z-aaaaaa", "flow_run_id": "f-1", "pid": 1}')
    assert unchanged_since(project, frozen=True) is None, "a run died whose end Prefect does not know"
    note.unlink()

    (toy.root / "expectations" / "README.md").write_text("Another rule.")
    toy.commit()
    assert unchanged_since(project, frozen=True) is None, "validate depends on this file"
    toy.git("revert", "--no-edit", "HEAD")
    assert unchanged_since(project, frozen=True) == record

    toy.change_params(evaluate={"bootstrap": 2})
    toy.commit()
    assert unchanged_since(project, frozen=True) is None


def test_without_a_record_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    assert unchanged_since(Project.find(make_toy(tmp_path / "project").root), frozen=True) is None


@pytest.mark.slow
def test_a_check_that_fails_leaves_nothing_behind(toy: Toy) -> None:
    project = Project.find(toy.root)
    (toy.root / "sources.lock.json").write_text("{}")
    with pytest.raises(SourceError, match="not a lock of sources"):
        unchanged_since(project, frozen=True)
    assert project.runs() == []
    assert toy.git("worktree", "list").count("\n") == 1
