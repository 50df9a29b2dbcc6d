"""One run's life without Prefect: the graph, its stages, its failures, its record, its bytes later."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelweld.errors import (
    CheckpointError,
    DiskFull,
    ExternalError,
    GateRefused,
    ModelweldError,
    RemoteUnavailable,
    WorkspaceError,
)
from modelweld.workspace import Project, Record, Worktree, materialise
from modelweld.workspace.failures import StageBusy
from tests.support.toy import Toy, environment, make_toy

GROUPS = ["fetch", "validate", "merge", "baselines", "evaluate"]
STAGES = [
    *("fetch@dataset-a", "fetch@dataset-b", "fetch@model-a", "fetch@model-b", "fetch@model-base"),
    *("validate", "merge", "baselines", "evaluate@a", "evaluate@b"),
]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return make_toy(tmp_path / "project")


@pytest.fixture
def project(toy: Toy) -> Project:
    return Project.find(toy.root)


@pytest.fixture
def tree(toy: Toy, project: Project) -> Iterator[Worktree]:
    with project.worktree() as opened:
        take_pins(toy, opened)
        yield opened


def take_pins(toy: Toy, tree: Worktree) -> None:
    shutil.copy(toy.root / "sources.lock.json", tree.path)


def fetch(toy: Toy, tree: Worktree) -> None:
    take_pins(toy, tree)
    tree.repro("fetch")


def fetch_and_record(toy: Toy) -> Record:
    """A record of the first group alone: what it is does not depend on how much was run."""
    with Project.find(toy.root).worktree() as tree:
        fetch(toy, tree)
        return tree.record()


def run_all(toy: Toy) -> Record:
    with Project.find(toy.root).worktree() as tree:
        take_pins(toy, tree)
        for group in tree.groups():
            tree.repro(group)
        return tree.record()


@pytest.fixture(scope="module")
def ran_once(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    toy = make_toy(tmp_path_factory.mktemp("ran") / "project")
    run_all(toy)
    return toy


@pytest.fixture
def finished(ran_once: Toy, tmp_path: Path) -> Toy:
    """A copy of a project that has run once."""
    shutil.copytree(ran_once.root, tmp_path / "project", symlinks=True)
    return Toy(tmp_path / "project", tmp_path / "project-remote")


def test_groups_and_stages_come_from_dvc_yaml(tree: Worktree) -> None:
    assert tree.groups() == GROUPS
    assert [stage for stages in tree.graph.groups.values() for stage in stages] == STAGES
    assert tree.graph.kept_by_git == ("scores/a.json", "scores/b.json", "validation/gate.json")
    assert tree.stale_stages() == STAGES
    assert tree.affected(["fetch@model-b"]) == ["fetch@model-b", *STAGES[5:8], "evaluate@a", "evaluate@b"]
    with pytest.raises(WorkspaceError, match="no stage 'train'"):
        tree.repro("train")


def test_a_pipeline_in_a_folder_below_is_not_this_one(toy: Toy, project: Project) -> None:
    (toy.root / "examples").mkdir()
    (toy.root / "examples" / "dvc.yaml").write_text("stages: {finetune: {cmd: 'true', outs: [expert]}}\n")
    toy.commit()
    with project.worktree() as tree:
        take_pins(toy, tree)
        assert tree.groups() == GROUPS


def test_a_graph_whose_groups_wait_for_one_another_is_refused(toy: Toy, project: Project) -> None:
    (toy.root / "dvc.yaml").write_text(
        "stages:\n"
        "  x: {foreach: {one: {out: x1, dep: params.yaml}, two: {out: x2, dep: y1}},"
        " do: {cmd: 'echo > ${item.out}', deps: ['${item.dep}'], outs: ['${item.out}']}}\n"
        "  y: {foreach: {one: {out: y1, dep: x1}, two: {out: y2, dep: x2}},"
        " do: {cmd: 'echo > ${item.out}', deps: ['${item.dep}'], outs: ['${item.out}']}}\n"
    )
    toy.commit()
    with pytest.raises(WorkspaceError, match="wait for one another"), project.worktree() as tree:
        tree.groups()


def test_a_broken_dvc_yaml_is_told_in_dvcs_words(toy: Toy, project: Project) -> None:
    with pytest.raises(WorkspaceError, match=r"sources\.lock\.json") as error, project.worktree() as tree:
        tree.groups()
    assert error.value.hint == "`modelweld pin` writes it"


@pytest.mark.slow
def test_a_run_its_record_and_what_is_stale_afterwards(toy: Toy, project: Project) -> None:
    lines: list[str] = []
    with project.worktree("20260101T000000Z-abcdef") as tree:
        take_pins(toy, tree)
        done = [tree.repro(group, on_line=lines.append) for group in tree.groups()]
        linked = (tree.path / "merged" / "weights.txt").stat()
        record = tree.record(flow_run_id="f-1")
    assert [stage for repro in done for stage in repro.ran] == STAGES
    assert "at work on merge" in lines
    assert linked.st_nlink > 1, "the output is a link into the cache, not a second copy"
    assert not linked.st_mode & stat.S_IWUSR

    assert record.tag == "merge-run/toy/20260101T000000Z-abcdef"
    assert (record.verdict, record.flow_run_id, record.dirty) == ("pass", "f-1", False)
    assert record.address == f"dvc://{toy.root}@{record.tag}:merged"
    assert toy.git("rev-parse", f"{record.commit}^").strip() == toy.git("rev-parse", "main").strip()
    kept = toy.git("diff", "--name-only", "main", record.commit).split()
    assert kept == ["dvc.lock", "scores/a.json", "scores/b.json", "sources.lock.json", "validation/gate.json"]
    assert toy.git("cat-file", "-t", record.tag).strip() == "tag"
    assert toy.git("branch", "--list").split() == ["*", "main"]
    assert json.loads(record.read("scores/a.json"))["task"] == "a"
    assert project.latest_record("toy") == record
    assert project.latest_record("another") is None
    assert project.record("toy/20260101T000000Z-abcdef") == record

    toy.ran()
    with project.worktree() as again:
        assert again.started_from == record
        take_pins(toy, again)
        assert again.stale_stages() == []
    toy.pin(model_b="b-2")
    with project.worktree() as changed:
        take_pins(toy, changed)
        assert changed.stale_stages()[0] == "fetch@model-b"
        assert "fetch@model-a" not in changed.affected(changed.stale_stages())
        for group in changed.groups():
            changed.repro(group)
        second = changed.record()
    assert toy.ran() == ["fetch@model-b", "validate", "merge", "baselines", "evaluate@a", "evaluate@b"]
    assert [known.tag for known in project.records()] == [second.tag, record.tag]


@pytest.mark.slow
def test_the_lock_is_the_one_that_dvc_repro_by_hand_writes(toy: Toy, tmp_path: Path) -> None:
    record = run_all(toy)
    by_hand = make_toy(tmp_path / "by-hand")
    by_hand.dvc("repro")
    assert (by_hand.root / "dvc.lock").read_bytes() == record.read("dvc.lock")
    toy.pin(model_a="a-2")
    by_hand.pin(model_a="a-2")
    by_hand.dvc("repro")
    assert (by_hand.root / "dvc.lock").read_bytes() == run_all(toy).read("dvc.lock")


def test_a_dirty_run_says_so_and_holds_what_it_ran(toy: Toy, project: Project) -> None:
    toy.change_params(evaluate={"bootstrap": 3})
    with project.worktree(allow_dirty=True) as tree:
        fetch(toy, tree)
        record = tree.record()
    assert record.dirty
    assert b"bootstrap: 3" in record.read("params.yaml")
    assert "bootstrap: 3" in (toy.root / "params.yaml").read_text(), "the project's own change is where it was"


def test_two_runs_at_once_share_one_cache(toy: Toy, project: Project) -> None:
    with project.worktree() as one, project.worktree() as two:
        take_pins(toy, one)
        toy.pin(model_a="a-2")
        take_pins(toy, two)
        threads = [threading.Thread(target=tree.repro, args=("fetch",)) for tree in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first, second = one.record(), two.record()
    assert first.lock_digest != second.lock_digest
    assert len(project.records("toy")) == 2


@pytest.mark.parametrize(("code", "kind"), [("1", GateRefused), ("2", CheckpointError), ("3", DiskFull)])
def test_a_stages_own_error_reaches_the_caller_with_its_type_and_place(
    toy: Toy, project: Project, code: str, kind: type[ModelweldError]
) -> None:
    toy.order("fetch@model-a", "exit", code)
    with pytest.raises(kind) as error, project.worktree() as tree:
        fetch(toy, tree)
    assert type(error.value) is kind
    assert error.value.exit_code == int(code)
    assert error.value.what == "fetch@model-a was told to fail"
    assert error.value.where == "stage fetch@model-a: models/a"
    assert error.value.hint == "take the order away"


@pytest.mark.parametrize(("code", "kind"), [("1", ModelweldError), ("3", ExternalError), ("-9", ExternalError)])
def test_a_command_that_reports_nothing_is_judged_by_its_exit_code(
    toy: Toy, project: Project, code: str, kind: type[ModelweldError]
) -> None:
    toy.order("fetch@model-a", "exit", code)
    (toy.root / "orders" / "unreported").touch()
    with pytest.raises(kind) as error, project.worktree() as tree:
        fetch(toy, tree)
    assert type(error.value) is kind
    assert error.value.where == "stage fetch@model-a"
    assert "fetch@model-a was told to fail" in error.value.what


def test_a_crash_is_not_a_gate_that_said_no(toy: Toy, project: Project) -> None:
    (toy.root / "sources.lock.json").write_text('{"version": 1, "pinned": {"model-a": {"path": "models/a"}}}')
    with pytest.raises(ModelweldError, match="exit code 1") as error, project.worktree() as tree:
        fetch(toy, tree)
    assert not isinstance(error.value, GateRefused)
    assert "KeyError: 'revision'" in error.value.what


def test_a_file_that_was_not_committed(toy: Toy, project: Project) -> None:
    toy.git("rm", "-r", "--quiet", "--cached", "expectations")
    toy.git("commit", "--quiet", "--message", "forget")
    with project.worktree() as tree:
        fetch(toy, tree)
        with pytest.raises(WorkspaceError, match=r"dvc\.yaml needs expectations") as error:
            tree.repro("validate")
    assert error.value.hint == "git add expectations && git commit"


def test_a_command_that_is_not_there(toy: Toy, project: Project) -> None:
    text = (toy.root / "dvc.yaml").read_text().replace("python toy_stage.py", "no-such-program")
    (toy.root / "dvc.yaml").write_text(text)
    toy.commit()
    with pytest.raises(WorkspaceError, match="command was not found"), project.worktree() as tree:
        fetch(toy, tree)


def test_a_second_dvc_in_one_worktree_is_busy(toy: Toy, tree: Worktree) -> None:
    toy.order("fetch@dataset-a", "sleep", "4")
    other = threading.Thread(target=lambda: tree.repro("fetch"))
    other.start()
    wait_for(lambda: "fetch@dataset-a" in toy.ran())
    with pytest.raises(StageBusy):
        tree.repro("fetch")
    other.join()


def test_a_stage_that_takes_too_long_is_ended(toy: Toy, tree: Worktree) -> None:
    toy.order("fetch@dataset-a", "sleep", "60")
    started = time.monotonic()
    with pytest.raises(ExternalError, match="not done after 2 s") as error:
        tree.repro("fetch", timeout_s=2)
    assert error.value.hint
    assert "--stage-timeout" in error.value.hint
    assert time.monotonic() - started < 30


def test_stages_die_with_the_process_that_started_them(toy: Toy) -> None:
    toy.order("fetch@dataset-a", "sleep", "300")
    code = f"""
import shutil
from modelweld.workspace import Project
from pathlib import Path
with Project.find(Path({str(toy.root)!r})).worktree() as tree:
    shutil.copy({str(toy.root / "sources.lock.json")!r}, tree.path)
    tree.repro("fetch", on_line=print)
"""
    child = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.DEVNULL, env=environment())
    wait_for(lambda: "fetch@dataset-a" in toy.ran())
    mark = str(toy.root / ".modelweld" / "runs")
    assert stage_processes(mark)
    child.kill()
    child.wait()
    wait_for(lambda: not stage_processes(mark))
    (toy.root / "orders" / "fetch@dataset-a.sleep").unlink()
    assert fetch_and_record(toy).tag, "the next run is not disturbed"


def stage_processes(mark: str) -> list[str]:
    """The processes whose working directory lies under `mark`."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if str(link.readlink()).startswith(mark):
                found.append(link.parent.name)
        except OSError:
            continue
    return found


def wait_for(condition: object, timeout_s: float = 30) -> None:
    assert callable(condition)
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_push_and_materialise_from_the_remote_alone(finished: Toy, tmp_path: Path) -> None:
    project = Project.find(finished.root)
    record = project.records()[0]
    cache, away = finished.root / ".dvc" / "cache", tmp_path / "away"
    cache.rename(away)
    with pytest.raises(RemoteUnavailable, match="neither the cache nor the remote"):
        materialise(project, record.tag, "merged", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    shutil.rmtree(cache, ignore_errors=True)
    away.rename(cache)
    project.push(record)
    shutil.rmtree(cache)
    out = materialise(project, record.tag, "merged", tmp_path / "deep" / "merged")
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "weights.txt"]
    alone = materialise(project, record.commit, "merged/manifest.json", tmp_path / "manifest.json")
    assert alone.read_bytes() == (out / "manifest.json").read_bytes()
    with pytest.raises(WorkspaceError, match="already exists"):
        materialise(project, record.tag, "merged", out)
    with pytest.raises(WorkspaceError, match="names no output 'weights'") as error:
        materialise(project, record.tag, "weights", tmp_path / "x")
    assert error.value.hint
    assert "merged" in error.value.hint
    with pytest.raises(WorkspaceError, match="no file 'none'"):
        materialise(project, record.tag, "merged/none", tmp_path / "x")


def test_damaged_bytes_are_refused_and_leave_nothing(finished: Toy, tmp_path: Path) -> None:
    project = Project.find(finished.root)
    record = project.records()[0]
    for path in (finished.root / ".dvc" / "cache" / "files").rglob("*"):
        if path.is_file() and b"-1\n" in path.read_bytes():
            path.chmod(0o644)
            path.write_bytes(path.read_bytes().replace(b"-1\n", b"-9\n"))
            path.chmod(0o444)
    with pytest.raises(RemoteUnavailable, match=r"weights\.txt: its bytes are not"):
        materialise(project, record.tag, "models/a", tmp_path / "a")
    assert list(tmp_path.glob("*a*")) == []


def test_a_remote_that_takes_nothing_keeps_the_record(toy: Toy, project: Project) -> None:
    record = fetch_and_record(toy)
    toy.remote.write_text("a file where a folder should be")
    with pytest.raises(RemoteUnavailable) as error:
        project.push(record)
    assert error.value.exit_code == 3
    toy.remote.unlink()
    project.push(record)
    assert list(toy.remote.rglob("*.dir"))


def test_no_remote_is_bad_input(toy: Toy, project: Project) -> None:
    toy.dvc("remote", "remove", "store")
    toy.commit()
    with project.worktree() as tree:
        take_pins(toy, tree)
        with pytest.raises(WorkspaceError, match="no remote") as error:
            tree.push()
    assert error.value.hint
    assert "dvc remote add" in error.value.hint


def test_unfinished_records_are_remembered_until_done(toy: Toy, project: Project) -> None:
    record = fetch_and_record(toy)
    assert project.unfinished() == []
    project.mark_unfinished(record, reason="the disk was away")
    (known,) = Project.find(toy.root).unfinished()
    assert (known.record, known.steps, known.reason) == (record, ("push", "register"), "the disk was away")
    project.mark_done(record, "push")
    assert project.missing_steps(record) == ("register",)
    project.mark_done(record, "register")
    assert project.unfinished() == []
    project.mark_unfinished(record)
    toy.git("tag", "--delete", record.tag)
    assert project.unfinished() == []


def test_tags_that_are_not_records_are_told_apart(toy: Toy, project: Project) -> None:
    toy.git("tag", "--annotate", "--message", "mine", "merge-run/toy/by-hand")
    with pytest.raises(WorkspaceError, match="not the record of a run"):
        project.record("toy/by-hand")
    with pytest.raises(WorkspaceError, match="no record"):
        project.record("toy/never")


def test_records_carry_a_name_where_git_knows_none(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.git("config", "--unset", "user.email")
    toy.git("config", "--unset", "user.name")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    record = fetch_and_record(toy)
    assert toy.git("log", "-1", "--format=%cn <%ce>", record.commit).strip() == "modelweld <modelweld@localhost>"
