"""Where a version came from, gathered from MLflow, git, DVC and the ledger, and whether the four tell one story."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from modelweld.errors import InputError, ModelweldError
from modelweld.formats.address import DvcAddress
from modelweld.registry import aliases
from modelweld.registry.connection import guarded
from modelweld.registry.gate import normalised
from modelweld.registry.materialise import materialise
from modelweld.registry.promotion import LEDGER, Registry
from modelweld.registry.registration import MODEL_ID, RECORD
from modelweld.workspace import Project, Record

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Audit:
    """The lineage of one version as a JSON-able document; `consistent` when every check in it holds."""

    document: dict[str, Any]

    @property
    def consistent(self) -> bool:
        """Whether every check holds."""
        return all(check["ok"] for check in self.document["checks"])


def audit(registry: Registry, wanted: str, *, weights: bool = False) -> Audit:
    """The lineage of a version (a number or an alias); `weights` brings them here and checks their digests as well."""
    with guarded(registry.uri):
        number = aliases.resolve(registry.client, registry.name, wanted)
        version = registry.version(number)
        tags = version.tags
        where = f"{registry.name} version {number}"
        address = DvcAddress.from_tags(tags, where)
        standing = registry.aliases()
        document = {
            "name": registry.name,
            "version": number,
            "uri": f"models:/{registry.name}/{number}",
            "aliases": [alias for alias, holder in standing.items() if holder == number],
            "record": tags.get(RECORD),
            "commit": tags.get("modelweld.commit"),
            "source_commit": tags.get("modelweld.source_commit"),
            "mlflow_run": version.run_id,
            "weights": str(address),
            "md5": address.md5,
            "manifest_sha256": address.manifest_sha256,
            "method": tags.get("modelweld.method"),
            "gate": tags.get("modelweld.gate"),
            "tasks": (tags.get("modelweld.tasks") or "").split(","),
            "normalised": {task: normalised(scores) for task, scores in registry.scoreboard(number).items()},
            "parents": _parents(registry, version),
        }
        checks = _checks(registry, version, address, standing)
    if weights:
        checks.append(_check("weights match the registered digests", lambda: str(materialise(address))))
    document["ledger"] = _history(registry, number)
    document["checks"] = checks
    return Audit(document)


def _parents(registry: Registry, version: ModelVersion) -> list[dict[str, Any]]:
    run = registry.client.get_run(version.run_id)
    models = [registry.client.get_logged_model(item.model_id) for item in run.inputs.model_inputs]
    return sorted(
        ({"name": model.name, "model_id": model.model_id, **model.params} for model in models),
        key=lambda item: item["name"],
    )


def _history(registry: Registry, number: int) -> list[dict[str, Any]]:
    try:
        events = registry.ledger.events()
    except ModelweldError:
        return []  # the check says what is wrong with it
    return [event.data() for event in events if event.version == number]


def _checks(
    registry: Registry, version: ModelVersion, address: DvcAddress, standing: dict[str, int]
) -> list[dict[str, Any]]:
    project = Project.find(registry.root)
    tags = version.tags

    def record() -> Record:
        return project.record(tags.get(RECORD, ""))

    def commit() -> str:
        return _same(record().commit, tags.get("modelweld.commit"))

    def lock() -> str:
        return _same(
            "sha256:" + hashlib.sha256(record().read("dvc.lock")).hexdigest(), tags.get("modelweld.lock_digest")
        )

    def merged() -> str:
        stages = yaml.safe_load(record().read("dvc.lock"))["stages"].values()
        outs = {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}
        return _same(outs.get(address.path), address.md5)

    def pointer() -> str:
        return _same(_served_address(registry, version), address)

    def ledger() -> str:
        return f"{len(registry.ledger.events())} events"

    def anchor() -> str:
        digests = {event.digest for event in registry.ledger.events()}
        anchored: str | None = tags.get(LEDGER)
        if anchored is None:
            return "no event yet"
        if anchored not in digests:
            raise InputError(f"the ledger does not hold {anchored}, which MLflow remembers")
        return anchored

    def moved() -> str:
        events = registry.ledger.events()
        return _same(standing, events[-1].aliases if events else {})

    return [
        _check("the record's tag points at the registered commit", commit),
        _check("dvc.lock in the record is the registered one", lock),
        _check("dvc.lock names the registered weights", merged),
        _check("what MLflow would load points at the same weights", pointer),
        _check("the ledger's chain is whole", ledger),
        _check("the ledger holds the event that MLflow remembers", anchor),
        _check("the aliases stand where the ledger left them", moved),
    ]


def _served_address(registry: Registry, version: ModelVersion) -> DvcAddress:
    """The address inside the pyfunc's own MLmodel file."""
    from mlflow.artifacts import download_artifacts

    place = registry.client.get_logged_model(version.tags.get(MODEL_ID, "")).artifact_location
    with tempfile.TemporaryDirectory(prefix="modelweld-") as folder:
        path = download_artifacts(f"{place}/MLmodel", dst_path=folder, tracking_uri=registry.uri)
        flavors = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["flavors"]
    return DvcAddress.from_data(flavors["python_function"]["config"]["dvc"], "MLmodel")


def _same(found: Any, registered: Any) -> str:
    if found != registered:
        raise InputError(f"{found}, registered was {registered}")
    return str(found)


def _check(name: str, look: Any) -> dict[str, Any]:
    try:
        return {"check": name, "ok": True, "saw": look()}
    except ModelweldError as error:
        return {"check": name, "ok": False, "saw": error.what}
