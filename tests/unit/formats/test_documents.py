"""What holds for every document: one reader, one writer, a version, a schema that describes what is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from modelweld.cli import main
from modelweld.errors import InputError, ModelweldError, SourceError
from modelweld.formats import (
    DOCUMENTS,
    Document,
    DvcAddress,
    Gate,
    LedgerEvent,
    Lock,
    RunRecord,
    TaskScores,
    json_schema,
)

FROZEN = Path(__file__).parents[2] / "formats" / "v0.1"
VERSIONED = {name: kind for name, kind in DOCUMENTS.items() if issubclass(kind, Document)}


def stored(name: str) -> Any:
    """A document of each kind as an earlier release wrote it, in plain JSON values."""
    if name == "record":
        text = (FROZEN / "plain" / "record.txt").read_text(encoding="utf-8")
        return json.loads(text[text.index("{") :])
    if name == "ledger-event":
        return json.loads((FROZEN / "ledger" / "events.jsonl").read_text(encoding="utf-8").splitlines()[0])
    if name == "address":
        return json.loads((FROZEN / "mlflow.json").read_text(encoding="utf-8"))["1"]["model_config"]["dvc"]
    path = {
        "lock": "plain/sources.lock.json",
        "gate": "aligned/validation/gate.json",
        "scores": "plain/scores/colour.json",
        "manifest": "aligned/merged/manifest.json",
        "alignment": "aligned/merged/alignment.json",
    }[name]
    return json.loads((FROZEN / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_written_is_what_the_schema_describes(name: str) -> None:
    schema = json_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    written = DOCUMENTS[name].from_data(stored(name), "here").data()  # type: ignore[attr-defined]
    jsonschema.validate(written, schema)
    with pytest.raises(jsonschema.ValidationError, match="unheard"):
        jsonschema.validate(written | {"unheard": 1}, schema)
    for key in schema["required"]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({k: value for k, value in written.items() if k != key}, schema)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_renamed_key_is_refused_and_named(name: str) -> None:
    document = stored(name)
    for key in json_schema(name)["required"]:
        if key in ("version", "schema"):
            continue
        renamed = {("renamed" if k == key else k): value for k, value in document.items()}
        with pytest.raises(ModelweldError) as caught:
            DOCUMENTS[name].from_data(renamed, "here")  # type: ignore[attr-defined]
        assert caught.value.where == "here"
        assert "renamed" in caught.value.what or key in caught.value.what


@pytest.mark.parametrize("name", VERSIONED)
def test_a_version_that_is_not_known_is_refused_with_those_that_are(name: str) -> None:
    kind = VERSIONED[name]
    document = stored(name) | {kind.VERSION_KEY: 99}
    with pytest.raises(kind.ERROR, match=r"is 99, known is ") as caught:
        kind.from_data(document, "here")
    assert all(str(version) in caught.value.what for version in kind.READS)
    assert "newer" in str(caught.value.hint)


@pytest.mark.parametrize("text", ["", "[]", "null", '"text"', "{", "\udcff"])
def test_what_is_no_document_is_refused(text: str) -> None:
    for kind in VERSIONED.values():
        with pytest.raises(kind.ERROR, match=f"not a {kind.NAME}"):
            kind.from_json(text.encode(errors="surrogateescape"), "here")


def test_a_file_that_is_missing_is_told_from_one_that_is_damaged(tmp_path: Path) -> None:
    assert Lock.read_if_present(tmp_path / "sources.lock.json") is None
    with pytest.raises(SourceError, match="no readable lock of sources"):
        Lock.read(tmp_path / "sources.lock.json")
    (tmp_path / "sources.lock.json").write_text("{}")
    with pytest.raises(SourceError, match="not a lock of sources"):
        Lock.read_if_present(tmp_path / "sources.lock.json")


def test_a_file_is_replaced_in_one_step_and_left_alone_when_it_is_the_same(tmp_path: Path) -> None:
    path, cached = tmp_path / "deep" / "gate.json", tmp_path / "cached"
    gate = Gate.of([])
    assert gate.write(path)
    os.link(path, cached)
    assert not gate.write(path)
    assert path.samefile(cached)
    changed = gate.model_copy(update={"verdict": "fail"})
    assert changed.write(path)
    assert (Gate.read(path), Gate.read(cached)) == (changed, gate)
    assert [file.name for file in path.parent.iterdir()] == ["gate.json"]


def test_a_gate_of_version_1_is_read_with_its_hints() -> None:
    document = stored("gate")
    assert document["version"] == 1
    gate = Gate.from_data(document, "here")
    hints = [result["mend"] for result in document["results"] if not result["success"]]
    assert [warning.hint for warning in gate.warnings] == hints
    assert all(hints)
    assert '"mend"' not in gate.to_json()
    assert gate.data()["version"] == 2


def test_what_is_none_and_may_be_missing_is_left_out() -> None:
    address = DvcAddress.from_data(stored("address"), "here")
    assert address.url is None
    assert "url" not in address.data()
    event = LedgerEvent.from_data(stored("ledger-event"), "here")
    assert event.data().keys() >= {"reasons", "previous"}
    assert event.data().keys().isdisjoint({"override", "reason"})


def test_a_record_may_be_followed_by_a_signature() -> None:
    text = (FROZEN / "plain" / "record.txt").read_text(encoding="utf-8")
    record = RunRecord.from_message(f"{text}\n-----BEGIN PGP SIGNATURE-----\n{{}}\n", "here")
    assert record.to_message().strip() == text.strip()


def test_documents_are_frozen() -> None:
    scores = TaskScores.from_data(stored("scores"), "here")
    with pytest.raises(ValueError, match="frozen"):
        scores.rows = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_command_prints_the_schema_of_each(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["schema", "--document", name])
    assert not leaving.value.code
    assert json.loads(capsys.readouterr().out) == json_schema(name)


def test_an_unknown_name_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["schema", "--document", "diary"])
    assert leaving.value.code == 2
    assert "ledger-event" in capsys.readouterr().err


def test_an_address_that_is_not_whole_says_what_is_missing() -> None:
    with pytest.raises(InputError, match="md5 missing"):
        DvcAddress.from_tags({"modelweld.dvc.repo": "r", "modelweld.dvc.rev": "v", "modelweld.dvc.path": "p",
                              "modelweld.dvc.manifest_sha256": "m"}, "version 1")  # fmt: skip
