"""Re-derive or refuse: a record's merge is made again and compared byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from modelweld.cli import main
from modelweld.errors import WorkspaceError
from modelweld.workspace import Project
from modelweld.workspace.rederiving import rederive
from tests.support.toy import Toy, make_toy


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A project with one record, pushed; its cache is emptied, so that only the remote has the bytes."""
    toy = make_toy(tmp_path_factory.mktemp("recorded") / "project")
    project = Project.find(toy.root)
    with project.worktree() as tree:
        shutil.copy(toy.root / "sources.lock.json", tree.path)
        for group in tree.groups():
            tree.repro(group)
        record = tree.record()
    project.push(record)
    shutil.rmtree(toy.root / ".dvc" / "cache")
    toy.ran()
    return toy


def test_the_same_inputs_make_the_same_bytes_from_the_remote_alone(recorded: Toy) -> None:
    project = Project.find(recorded.root)
    record = project.latest_record()
    assert record is not None
    found = rederive(project, record)
    assert found.equal
    assert (found.stage, found.recorded) == ("merge", found.rebuilt)
    assert recorded.ran() == ["merge"]


def test_a_merge_that_comes_out_otherwise_is_refused(
    recorded: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODELWELD_PROJECT_ROOT", str(recorded.root))
    monkeypatch.setenv("TOY_ROUNDING", "a bit more")
    with pytest.raises(SystemExit) as leaving:
        main(["rederive", "--json"])
    assert leaving.value.code == 1
    said = json.loads(capsys.readouterr().out)
    assert said["error"] == "GateRefused"
    assert "merged was recorded as" in said["what"]


def test_an_output_that_was_never_recorded_is_named(recorded: Toy) -> None:
    project = Project.find(recorded.root)
    record = project.latest_record()
    assert record is not None
    with pytest.raises(WorkspaceError, match="no output 'mergd' in this record"):
        rederive(project, record, "mergd")


def test_nothing_recorded_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = make_toy(tmp_path / "project")
    monkeypatch.setenv("MODELWELD_PROJECT_ROOT", str(toy.root))
    with pytest.raises(SystemExit) as leaving:
        main(["rederive"])
    assert leaving.value.code == 2
    assert "nothing is recorded here yet" in capsys.readouterr().err
