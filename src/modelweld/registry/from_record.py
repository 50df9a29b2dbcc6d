"""Reading a recorded run out of git and DVC into the Registration that MLflow is told, and registering it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml

from modelweld.config import Register, Task
from modelweld.errors import WorkspaceError
from modelweld.formats.address import DvcAddress
from modelweld.formats.lock import LOCK_NAME, Lock
from modelweld.formats.manifest import Manifest
from modelweld.formats.scores import TaskScores
from modelweld.kinds import DEFAULT
from modelweld.registry.connection import connect, guarded, tracking_uri
from modelweld.registry.gate import Decision
from modelweld.registry.prediction import ServedTask
from modelweld.registry.promotion import nominate, open_registry
from modelweld.registry.registration import Parent, RegisteredVersion, Registration, find_version, register
from modelweld.workspace import Project, Record, materialise
from modelweld.workspace.git import line, try_git

OUT = "merged"
TEXTS = ("params.yaml", "dvc.yaml", "dvc.lock", "sources.lock.json", "validation/gate.json")
DEFAULT_MAX_LENGTH: int = Task.model_fields["max_length"].default


@dataclass(frozen=True)
class Outcome:
    """A record in the registry: its version, what the gate decided, and where the aliases stand."""

    registered: RegisteredVersion
    decision: Decision
    aliases: dict[str, int]

    def data(self) -> dict[str, Any]:
        """The outcome for JSON."""
        return {
            "name": self.registered.name,
            "version": self.registered.version,
            "uri": self.registered.uri,
            "run_id": self.registered.run_id,
            "record": self.registered.record,
            "created": self.registered.created,
            "aliases": self.aliases,
            "gate": self.decision.data(),
        }


def register_record(
    project_root: Path, tag: str, *, at: datetime, actor: str, uri: str | None = None, plots: tuple[Path, ...] = ()
) -> Outcome:
    """The record behind `tag` as a version, gated: `challenger` points at it when it passed, its tags say why when not.

    Every part is idempotent, so that the same call finishes what an interrupted one began.
    """
    registration = registration_from_record(project_root, tag, plots=plots)
    thresholds = Register.model_validate(registration.params.get("register", {}))
    where = uri or tracking_uri(project_root)
    registered = register(registration, where)
    registry = open_registry(project_root, registration.name, where)
    decision = nominate(registry, registered.version, thresholds, at=at, actor=actor)
    with guarded(where):
        return Outcome(registered, decision, registry.aliases())


def latest_unregistered(project_root: Path, uri: str | None = None) -> str | None:
    """The tag of the newest record that has no version yet; None when every record has one."""
    where = uri or tracking_uri(project_root)
    client = connect(where)
    with guarded(where):
        for record in Project.find(project_root).records():
            if find_version(client, record.name, record.tag) is None:
                return record.tag
    return None


def registration_from_record(project_root: Path, tag: str, *, plots: tuple[Path, ...] = ()) -> Registration:
    """What the tag's commit and the merged directory behind it say; WorkspaceError when the record is not whole."""
    project = Project.find(project_root)
    record = project.record(tag)
    params = _mapping(yaml.safe_load(record.read("params.yaml")), "params.yaml", record)
    documents = {path: record.read(path).decode() for path in (*TEXTS, *record.files("scores")) if _has(record, path)}
    manifest = _manifest(project, record)
    documents["manifest.json"] = manifest.decode()
    sources = record.read(LOCK_NAME)
    return Registration(
        name=record.name,
        record=record.tag,
        recorded_at=_recorded_at(project.root, record.tag),
        commit=record.commit,
        source_commit=try_git(project.root, "rev-parse", "--verify", "--quiet", f"{record.commit}^"),
        address=DvcAddress(
            repo=str(project.root),
            rev=record.tag,
            path=OUT,
            md5=_locked_md5(documents["dvc.lock"], record),
            manifest_sha256=hashlib.sha256(manifest).hexdigest(),
            url=_public_url(project.root),
            folder=try_git(project.root, "rev-parse", "--show-prefix") or None,
        ),
        manifest=Manifest.from_json(manifest, f"{record.tag}: {OUT}/manifest.json"),
        scores=_scores(record, params),
        parents=_parents(Lock.from_json(sources, f"{record.tag}: {LOCK_NAME}"), params),
        params=params,
        tasks={
            task: ServedTask(spec.get("max_length", DEFAULT_MAX_LENGTH), spec.get("kind", DEFAULT))
            for task, spec in params.get("tasks", {}).items()
        },
        lock_digest=record.lock_digest,
        sources_digest="sha256:" + hashlib.sha256(sources).hexdigest(),
        documents=documents,
        plots=plots,
        run_id=record.run_id,
        dirty=record.dirty,
    )


def _has(record: Record, path: str) -> bool:
    return bool(line(record.root, "ls-tree", "--name-only", record.commit, f"./{path}"))


def _recorded_at(root: Path, tag: str) -> datetime:
    seconds = line(root, "for-each-ref", "--format=%(taggerdate:unix)", f"refs/tags/{tag}")
    return datetime.fromtimestamp(int(seconds), tz=UTC)


def _manifest(project: Project, record: Record) -> bytes:
    with tempfile.TemporaryDirectory(prefix="modelweld-") as folder:
        return materialise(project, record.tag, f"{OUT}/manifest.json", Path(folder) / "manifest.json").read_bytes()


def _locked_md5(lock: str, record: Record) -> str:
    stages = yaml.safe_load(lock).get("stages", {})
    for stage in stages.values():
        for out in stage.get("outs", []):
            if out["path"] == OUT:
                return str(out["md5"])
    raise WorkspaceError(
        f"dvc.lock has no output {OUT!r}", where=record.tag, hint="run the merge stage, and record again"
    )


def _scores(record: Record, params: Mapping[str, Any]) -> dict[str, TaskScores]:
    written, tasks = record.files("scores"), sorted(params.get("tasks", {}))
    missing = [task for task in tasks if f"scores/{task}.json" not in written]
    if missing:
        raise WorkspaceError(
            f"tasks without scores: {', '.join(missing)}",
            where=record.tag,
            hint="run the evaluate stages, and record again",
        )
    paths = {task: f"scores/{task}.json" for task in tasks}
    return {task: TaskScores.from_json(record.read(path), f"{record.tag}: {path}") for task, path in paths.items()}


def _public_url(root: Path) -> str | None:
    """The git remote's URL without the password or token it may carry: it will stand in MLflow for all to read."""
    url = try_git(root, "config", "--get", "remote.origin.url")
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.password or (parts.username and parts.scheme in ("http", "https")):
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return url


def _parents(lock: Lock, params: Mapping[str, Any]) -> tuple[Parent, ...]:
    """The base and the experts that the recipe merges; a pinned model that it leaves out is no parent."""
    merged = params.get("merge", {}).get("models")
    return tuple(
        Parent(
            name=name,
            source=entry.resolved,
            revision=entry.revision,
            licence=entry.licence,
            files={path: file.sha256 for path, file in entry.files.items()},
        )
        for name, entry in sorted(lock.entries("model").items())
        if name == "base" or merged is None or name in merged
    )


def _mapping(value: Any, path: str, record: Record) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise WorkspaceError(f"{path} holds no mapping", where=record.tag)
    return value
