"""A stage's error as a document: every type comes back as it was, and nothing else is taken for one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modelweld import errors, settings, stage_errors
from modelweld.errors import ModelweldError


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name[0].isupper()])
def test_every_type_survives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: type[ModelweldError] = getattr(errors, name)
    file = tmp_path / "error.json"
    monkeypatch.setenv(settings.ERROR_FILE, str(file))
    stage_errors.write(kind("no space", where="merged/: x", hint="free 3 GB"))
    found = stage_errors.read(file)
    assert found
    assert (type(found), found.what, found.where, found.hint) == (kind, "no space", "merged/: x", "free 3 GB")
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_a_defect_is_reported_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv(settings.ERROR_FILE, str(file))
    stage_errors.write(ZeroDivisionError("division by zero"))
    found = stage_errors.read(file)
    assert type(found) is ModelweldError
    assert found.what == "crashed: ZeroDivisionError: division by zero"


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(settings.ERROR_FILE, raising=False)
    stage_errors.write(ModelweldError("it failed"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "document", [[], {}, {"schema": "modelweld.stage_error/2"}, {"schema": stage_errors.SCHEMA, "error": "OSError"}]
)
def test_what_is_no_such_document_is_no_error(document: object, tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    assert stage_errors.read(file) is None
    file.write_text(json.dumps(document))
    assert stage_errors.read(file) is None


def test_the_command_writes_the_error_it_ends_with(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    done = subprocess.run(
        [sys.executable, "-m", "modelweld", "stage", "fetch", "model-a"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), settings.ERROR_FILE: str(file)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    found = stage_errors.read(file)
    assert isinstance(found, errors.SourceError)
    assert (found.what, found.where) == ("nothing is pinned yet", "sources.lock.json")
