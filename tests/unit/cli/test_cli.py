"""The command: exit codes, errors that can be acted on, JSON for machines."""

from __future__ import annotations

import json

import pytest

from modelweld.cli import main
from modelweld.errors import DiskFull, GateRefused, InputError, ModelweldError


def leave_code(*words: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(list(words))
    return int(leaving.value.code or 0)


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave_code("schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Params"


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave_code("frobnicate") == 2
    assert "No such command" in capsys.readouterr().err


def test_an_error_names_what_where_and_how_to_mend_it(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert leave_code("merge", "/nowhere/recipe.yaml", f"{tmp_path}/out") == 2
    text = capsys.readouterr().err
    assert "/nowhere/recipe.yaml" in text
    assert "hint:" in text
    assert "Traceback" not in text


def test_an_error_is_json_when_json_is_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert leave_code("merge", "/nowhere/recipe.yaml", f"{tmp_path}/out", "--json") == 2
    record = json.loads(capsys.readouterr().out)
    assert record["error"] == "ConfigError"
    assert record["where"] == "/nowhere/recipe.yaml"


@pytest.mark.parametrize(("kind", "code"), [(GateRefused, 1), (InputError, 2), (DiskFull, 3)])
def test_each_branch_of_the_tree_has_its_exit_code(kind: type[ModelweldError], code: int) -> None:
    assert kind("it failed").exit_code == code


def test_errors_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(DiskFull("no space", where="merged/", hint="free 3 GB")))  # noqa: S301
    assert (type(error), error.where, error.hint) == (DiskFull, "merged/", "free 3 GB")
