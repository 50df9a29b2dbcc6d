"""Finding a project, its worktrees, its dead runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from modelweld.errors import WorkspaceError
from modelweld.workspace import Project, Worktree
from modelweld.workspace.repository import KEPT_DEAD_RUNS, new_run_id
from tests.support.toy import Toy, environment, make_toy, run


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return make_toy(tmp_path / "project")


def test_find_from_a_folder_inside(toy: Toy) -> None:
    (toy.root / "deep" / "er").mkdir(parents=True)
    assert Project.find(toy.root / "deep" / "er").root == toy.root
    assert Project.find(toy.root).name == "toy"


def test_not_a_git_repository(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="not in a git repository") as error:
        Project.find(tmp_path)
    assert error.value.hint
    assert "git init" in error.value.hint
    assert error.value.exit_code == 2


def test_dvc_not_initialised(tmp_path: Path) -> None:
    run(tmp_path, "git", "init", "--quiet")
    with pytest.raises(WorkspaceError, match="DVC is not initialised") as error:
        Project.find(tmp_path)
    assert error.value.hint
    assert "dvc init" in error.value.hint


def test_no_commit_yet(tmp_path: Path) -> None:
    run(tmp_path, "git", "init", "--quiet")
    run(tmp_path, sys.executable, "-m", "dvc", "init", "--quiet")
    with pytest.raises(WorkspaceError, match="no commit yet"), Project.find(tmp_path).worktree():
        pass


def test_needed_files_must_be_committed(toy: Toy) -> None:
    toy.git("rm", "--quiet", "--cached", "params.yaml")
    toy.git("commit", "--quiet", "--message", "forget")
    with pytest.raises(WorkspaceError, match=r"not committed: params\.yaml"), Project.find(toy.root).worktree():
        pass


def test_worktree_is_head_and_leaves_nothing(toy: Toy) -> None:
    project = Project.find(toy.root)
    before = toy.git("status", "--porcelain"), toy.git("rev-parse", "HEAD")
    with project.worktree() as tree:
        assert tree.path.parent == toy.root / ".modelweld" / "runs"
        assert (tree.path / "dvc.yaml").is_file()
        assert not (tree.path / "sources.lock.json").exists()
        assert tree.name == "toy"
        assert not tree.dirty
        assert [(state.run_id, state.alive) for state in project.runs()] == [(tree.run_id, True)]
        assert toy.git("status", "--porcelain") == before[0], "the project's own checkout sees nothing of a run"
    assert not tree.path.exists()
    assert project.runs() == []
    assert (toy.git("status", "--porcelain"), toy.git("rev-parse", "HEAD")) == before
    assert "runs" not in toy.git("worktree", "list")


def test_a_project_below_the_top_of_its_repository(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "mono", below="team/merges")
    project = Project.find(toy.root)
    assert project.repository == tmp_path / "mono"
    with project.worktree() as tree:
        assert tree.path == toy.root / ".modelweld" / "runs" / tree.run_id / "team" / "merges"
        (tree.path / "sources.lock.json").write_bytes((toy.root / "sources.lock.json").read_bytes())
        for group in tree.groups():
            tree.repro(group)
        record = tree.record()
    assert b"merged" in record.read("dvc.lock")
    assert record.files("scores") == ["scores/a.json", "scores/b.json"]


def test_a_dirty_tree_is_refused_and_can_be_allowed(toy: Toy) -> None:
    project = Project.find(toy.root)
    toy.change_params(validate={"min_rows": 7})
    (toy.root / "toy_stage.py").chmod(0o755)
    (toy.root / "dvc.lock").write_text("a machine wrote this")
    with pytest.raises(WorkspaceError, match=r"committed: params\.yaml, toy_stage\.py") as error, project.worktree():
        pass
    assert error.value.hint
    assert "--allow-dirty" in error.value.hint
    with project.worktree(allow_dirty=True) as tree:
        assert tree.dirty
        assert "min_rows: 7" in (tree.path / "params.yaml").read_text()
        assert os.access(tree.path / "toy_stage.py", os.X_OK)


def test_tracked_locks_do_not_make_a_tree_dirty(toy: Toy) -> None:
    toy.git("add", "--force", "sources.lock.json")
    toy.git("commit", "--quiet", "--message", "track the lock")
    (toy.root / "sources.lock.json").write_text('{"version": 1, "pinned": {}}\n')
    assert Project.find(toy.root).changed_files() == []


def test_a_failed_run_is_kept_and_the_oldest_are_removed(toy: Toy) -> None:
    project = Project.find(toy.root)
    names = [f"2026010{number}T000000Z-aaaaaa" for number in range(KEPT_DEAD_RUNS + 2)]
    kept = [toy.root / ".modelweld" / "runs" / name for name in names]
    for name, path in zip(names, kept, strict=True):
        with pytest.raises(WorkspaceError, match="no stage 'train'"), project.worktree(name) as tree:
            fail_in(toy, tree)
        assert path.is_dir()
    assert [state.alive for state in project.runs()] == [False] * len(project.runs())
    project.prune_worktrees()
    assert [path.is_dir() for path in kept] == [False, False, True, True, True]
    assert toy.git("worktree", "list").count("runs/") == KEPT_DEAD_RUNS


def fail_in(toy: Toy, tree: Worktree) -> None:
    shutil.copy(toy.root / "sources.lock.json", tree.path)
    tree.repro("train")


def test_a_killed_run_is_seen_as_dead(toy: Toy) -> None:
    code = f"""
import time
from pathlib import Path
from modelweld.workspace import Project
with Project.find(Path({str(toy.root)!r})).worktree(flow_run_id="f-1") as tree:
    print("ready", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    project = Project.find(toy.root)
    assert [state.alive for state in project.runs()] == [True]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (state,) = project.runs()
    assert (state.alive, state.flow_run_id) == (False, "f-1")
    assert state.path.is_dir()
    with project.worktree() as tree:
        assert tree.path.is_dir()


def test_the_worktree_shares_the_cache_and_reaches_a_relative_remote(toy: Toy) -> None:
    (toy.root / ".dvc" / "config.local").write_text("['remote \"store\"']\n    verify = true\n")
    with Project.find(toy.root).worktree() as tree:
        said = run(tree.path, sys.executable, "-m", "dvc", "config", "--list")
    assert f"cache.dir={toy.root / '.dvc' / 'cache'}" in said
    assert f"remote.store.url={toy.remote}" in said
    assert "remote.store.verify=true" in said


def test_run_ids_sort_by_time() -> None:
    early, late = new_run_id(datetime(2026, 1, 2, tzinfo=UTC)), new_run_id(datetime(2026, 11, 2, tzinfo=UTC))
    assert early < late
    assert early.startswith("20260102T000000Z-")
    assert new_run_id() != new_run_id()
