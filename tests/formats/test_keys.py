"""The keys of every document that this release writes, against those of the newest frozen release.

A renamed or removed key would orphan what is stored. An added one is listed below, with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from modelweld.config import load_params
from modelweld.registry import aliases
from modelweld.registry.from_record import register_record
from modelweld.registry.ledger import FILE, Ledger
from modelweld.registry.promotion import open_registry, promote, rollback
from modelweld.sources import resolve
from modelweld.stages.evaluate import evaluate
from modelweld.stages.merge import merge_baselines, merge_pipeline
from modelweld.stages.validate import validate
from modelweld.workspace import Project
from modelweld.workspace import records as workspace_records
from tests.support.frozen import fetched, git, keys_of, keys_of_all, restore, told_to_mlflow

pytestmark = pytest.mark.slow
RELEASE = "v0.1"
FROZEN = Path(__file__).parent / RELEASE
NAME = "tiny"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

# Keys that are no longer written, by document: how a stored document that has them is read.
MIGRATED: dict[str, dict[str, str]] = {
    "gate": {"results[].mend": "called `hint` from version 2 on; version 1 is still read"},
}
# Keys that the frozen release did not write, by document: why a document without them is still whole.
ADDED: dict[str, dict[str, str]] = {
    "gate": {"results[].hint": "version 1 calls it `mend`"},
    "scores": dict.fromkeys(
        ("precision", "precision.requested", "precision.used"), "without it the precision is not known"
    ),
}


@dataclass(frozen=True)
class Today:
    """What this release makes of the frozen project's inputs: two runs stage by stage, and a registry's life."""

    plain: Path
    aligned: Path
    record: dict[str, Any]
    events: list[dict[str, Any]]
    mlflow: dict[str, Any]


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Today]:
    """The frozen runs made again, and their records registered and promoted again, in an MLflow of their own."""
    place = tmp_path_factory.mktemp("today")
    project = restore(FROZEN, place / "project")
    uri = f"sqlite:///{place / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MODELWELD_DVC_REPO", str(project))
        patch.setenv("MODELWELD_CACHE_DIR", str(place / "cache"))
        patch.setenv("MODELWELD_DEVICE", "cpu")
        patch.delenv("MODELWELD_PROJECT_ROOT", raising=False)
        plain, refused, aligned = sorted(workspace_records.tags(project))
        made = {
            name: run_again(project, tag, place / name) for name, tag in {"plain": plain, "aligned": aligned}.items()
        }
        git(project, "update-ref", "-d", f"refs/heads/modelweld/ledger/{NAME}")
        live_again(project, plain, refused, aligned)
        events = [event.entry.data() for event in Ledger(project, NAME).events()]
        yield Today(made["plain"], made["aligned"], record_again(project, plain), events, told_to_mlflow(uri, NAME))


def run_again(project: Path, tag: str, place: Path) -> Path:
    """Every stage over the models and data of a record."""
    params = fetched(project, tag, place)
    resolve(load_params(params), place).write(place / "sources.lock.json")
    validate(params, place)
    merge_pipeline(params, place)
    merge_baselines(params, place)
    for task in ("colour", "animal"):
        evaluate(task, params, place)
    return place


def record_again(project: Path, tag: str) -> dict[str, Any]:
    """What the tag of a record made now says."""
    (project / "dvc.lock").write_bytes(Project.find(project).record(tag).read("dvc.lock"))
    made = workspace_records.write(
        project, root=project, name=NAME, run_id="again", files=[], verdict="pass", flow_run_id="flow", dirty=False
    )
    return message_of(git(project, "for-each-ref", "--format=%(contents)", f"refs/tags/{made.tag}"))


def live_again(project: Path, plain: str, refused: str, aligned: str) -> None:
    """Every kind of event, in the order of the frozen ledger."""
    register_record(project, plain, at=NOW, actor="ada")
    registry = open_registry(project, NAME)
    promote(registry, "challenger", at=NOW, actor="ada")
    register_record(project, refused, at=NOW, actor="ada")
    promote(registry, "2", at=NOW, actor="ada", override="to see what overriding leaves behind")
    register_record(project, aligned, at=NOW, actor="ada")
    promote(registry, "3", at=NOW, actor="ada")
    rollback(registry, at=NOW, actor="ada", reason="version 3 was a trial")
    aliases.write(registry.client, NAME, {"champion": 1, "previous": 1})
    promote(registry, "3", at=NOW, actor="ada")


def message_of(text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text[text.index("{") :])
    return document


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def require_same(document: str, frozen: set[str], now: set[str]) -> None:
    """Fail for a key that is in one set only, unless it is listed above."""
    lost = sorted(frozen - now - MIGRATED.get(document, {}).keys())
    added = sorted(now - frozen - ADDED.get(document, {}).keys())
    if lost or added:
        pytest.fail(
            f"{document}: no longer written: {lost or 'nothing'}; not in {RELEASE}: {added or 'nothing'}.\n"
            f"Stored documents keep the keys of {RELEASE} for ever. For a renamed or removed key raise the document's "
            f"version, write a migration with a test that reads {RELEASE}, list the key in MIGRATED, and freeze a new "
            "version beside it. For an added key say in ADDED why a document without it is still whole."
        )


@pytest.mark.parametrize("run", ["plain", "aligned"])
@pytest.mark.parametrize(
    ("document", "path"),
    [
        ("lock", "sources.lock.json"),
        ("gate", "validation/gate.json"),
        ("scores", "scores/colour.json"),
        ("scores", "scores/animal.json"),
        ("manifest", "merged/manifest.json"),
    ],
)
def test_a_run_writes_the_keys_of_the_frozen_release(today: Today, run: str, document: str, path: str) -> None:
    require_same(document, keys_of(read(FROZEN / run / path)), keys_of(read(getattr(today, run) / path)))


def test_an_alignment_has_the_keys_of_the_frozen_release(today: Today) -> None:
    path = Path("merged") / "alignment.json"
    require_same("alignment", keys_of(read(FROZEN / "aligned" / path)), keys_of(read(today.aligned / path)))


def test_a_record_has_the_keys_of_the_frozen_release(today: Today) -> None:
    frozen = message_of((FROZEN / "plain" / "record.txt").read_text(encoding="utf-8"))
    require_same("record", keys_of(frozen), keys_of(today.record))


def test_events_of_every_kind_have_the_keys_of_the_frozen_release(today: Today) -> None:
    lines = (FROZEN / "ledger" / FILE).read_text(encoding="utf-8").splitlines()
    frozen = [json.loads(line) for line in lines]
    assert [event["event"] for event in today.events] == [event["event"] for event in frozen]
    for kind in {event["event"] for event in frozen}:
        require_same(
            f"ledger: {kind}",
            keys_of_all(event for event in frozen if event["event"] == kind),
            keys_of_all(event for event in today.events if event["event"] == kind),
        )


def test_mlflow_is_told_under_the_keys_of_the_frozen_release(today: Today) -> None:
    frozen = read(FROZEN / "mlflow.json")
    assert today.mlflow.keys() == frozen.keys()
    for version in frozen:
        require_same("mlflow", keys_of(frozen[version]), keys_of(today.mlflow[version]))
