"""Moving the aliases: the gate nominates a challenger, a person promotes it, one command rolls back.

Every move happens under a lock of the repository, on aliases read inside it, after the version's weights were brought
here and checked, and ends as one event of the ledger. What the ledger does not explain (an alias moved by hand, a crash
between the alias and its event) is recorded first, as `observed`.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from modelweld.config import Register
from modelweld.errors import GateRefused, InputError, WorkspaceError
from modelweld.registry import aliases
from modelweld.registry.address import DvcAddress
from modelweld.registry.aliases import CHALLENGER, CHAMPION, PREVIOUS
from modelweld.registry.connection import connect, guarded, tracking_uri
from modelweld.registry.gate import Decision, Scoreboard, decide
from modelweld.registry.ledger import Event, Ledger
from modelweld.registry.materialise import materialise
from modelweld.registry.registration import RECORD, SCORES
from modelweld.workspace.git import line, try_git

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

GATE = "modelweld.gate"
REASONS = "modelweld.gate.reasons"
AGAINST = "modelweld.gate.against"
THRESHOLDS = "modelweld.gate.thresholds"
LEDGER = "modelweld.ledger"
LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Registry:
    """One model's versions in MLflow and its ledger in the repository at `root`."""

    root: Path
    name: str
    uri: str
    client: MlflowClient
    ledger: Ledger

    def aliases(self) -> dict[str, int]:
        """Which version each alias points at."""
        return aliases.read(self.client, self.name)

    def version(self, number: int) -> ModelVersion:
        """The version as MLflow has it."""
        return self.client.get_model_version(self.name, str(number))

    def scoreboard(self, number: int) -> Scoreboard:
        """The scores a version was registered with."""
        found: dict[str, Any] = json.loads(self.version(number).tags.get(SCORES, "{}"))
        return found


@dataclass(frozen=True)
class Transition:
    """What a command did to the aliases; `event` is None when they stood there already."""

    name: str
    version: int
    before: dict[str, int]
    after: dict[str, int]
    event: Event | None

    def as_document(self) -> dict[str, Any]:
        """The transition for JSON."""
        return {
            "name": self.name,
            "version": self.version,
            "before": self.before,
            "aliases": self.after,
            "event": None if self.event is None else {**self.event.document, "digest": self.event.digest},
        }


def open_registry(root: Path, name: str, uri: str | None = None) -> Registry:
    """The registry of `name`; RegistryUnavailable when MLflow does not answer, WorkspaceError without a repository."""
    where = uri or tracking_uri(root)
    return Registry(root, name, where, connect(where), Ledger(root, name))


def current_actor(root: Path) -> str:
    """Who acts: MODELWELD_ACTOR, else git's user, else the operating system's."""
    given = os.environ.get("MODELWELD_ACTOR")
    if given:
        return given
    name, email = try_git(root, "config", "user.name"), try_git(root, "config", "user.email")
    return f"{name} <{email}>" if name and email else name or email or getpass.getuser()


def nominate(registry: Registry, version: int, thresholds: Register, *, at: datetime, actor: str) -> Decision:
    """The gate's decision on a version, written to its tags; `challenger` points at it when it passed.

    A version is decided on once: a second call returns the first decision and moves nothing.
    """
    with _transition(registry, at, actor) as standing:
        before = dict(standing)
        earlier = [event for event in registry.ledger.events() if event.version == version]
        if any(event.kind in (CHALLENGER, "refused") for event in earlier):
            return _decision_of(registry.version(version))
        decision = _judge(registry, version, standing.get(CHAMPION), thresholds)
        if decision.passed:
            standing[CHALLENGER] = version
            aliases.write(registry.client, registry.name, standing)
        kind = CHALLENGER if decision.passed else "refused"
        reasons = [reason.text for reason in decision.reasons]
        _record(registry, kind, version, before, standing, at=at, actor=actor, reasons=reasons)
        return decision


def promote(
    registry: Registry,
    wanted: str,
    *,
    at: datetime,
    actor: str,
    to: str = CHAMPION,
    override: str | None = None,
) -> Transition:
    """Make a version (a number or an alias) champion, and the champion so far previous.

    GateRefused unless its gate passed, against the champion of today; `override` is the reason for doing it all the
    same, and stands in the ledger. Weights that cannot be brought or are not what was registered stop it.
    """
    target = to.lower()
    if target not in (CHAMPION, CHALLENGER):
        raise InputError(f"cannot promote to {to!r}", where=registry.name, hint=f"--to {CHAMPION} or --to {CHALLENGER}")
    with _transition(registry, at, actor) as standing:
        before = dict(standing)
        version = aliases.resolve(registry.client, registry.name, wanted)
        if standing.get(target) == version:
            return Transition(registry.name, version, before, before, None)
        _require_gate(registry, version, standing.get(CHAMPION), override)
        _require_weights(registry, version)
        if target == CHAMPION:
            if CHAMPION in standing:
                standing[PREVIOUS] = standing[CHAMPION]
            if standing.get(CHALLENGER) == version:
                del standing[CHALLENGER]
        standing[target] = version
        aliases.write(registry.client, registry.name, standing)
        kind = "promoted" if target == CHAMPION else CHALLENGER
        event = _record(registry, kind, version, before, standing, at=at, actor=actor, override=override)
        return Transition(registry.name, version, before, standing, event)


def rollback(registry: Registry, *, at: datetime, actor: str, reason: str | None = None) -> Transition:
    """Make the previous champion champion again; `previous` becomes the one before it, so a second call goes further.

    InputError when there is nothing to go back to; weights are checked as for a promotion, the gate is not asked.
    """
    with _transition(registry, at, actor) as standing:
        before = dict(standing)
        if PREVIOUS not in standing:
            hint = "promote a version that you trust: `modelweld promote VERSION`"
            raise InputError("there is no previous champion to go back to", where=registry.name, hint=hint)
        version = standing.pop(PREVIOUS)
        _require_weights(registry, version)
        earlier = _champion_before(registry, version)
        standing[CHAMPION] = version
        if earlier is not None:
            standing[PREVIOUS] = earlier
        aliases.write(registry.client, registry.name, standing)
        event = _record(registry, "rolled_back", version, before, standing, at=at, actor=actor, reason=reason)
        return Transition(registry.name, version, before, standing, event)


@contextmanager
def _transition(registry: Registry, at: datetime, actor: str) -> Iterator[dict[str, int]]:
    """The aliases, read under the lock and in the ledger, for the caller to change."""
    directory = (registry.root / line(registry.root, "rev-parse", "--git-common-dir")).resolve() / "modelweld"
    directory.mkdir(exist_ok=True)
    try:
        with FileLock(directory / f"registry-{registry.name}.lock", timeout=LOCK_TIMEOUT_S), guarded(registry.uri):
            standing = registry.aliases()
            _observe(registry, standing, at=at, actor=actor)
            yield standing
    except Timeout as error:
        raise WorkspaceError(
            "another promotion or rollback has not ended", where=registry.name, hint="wait for it and try again"
        ) from error


def _observe(registry: Registry, standing: dict[str, int], *, at: datetime, actor: str) -> None:
    events = registry.ledger.events()
    recorded = events[-1].aliases if events else {}
    if recorded != standing:
        text = "the aliases were moved outside of modelweld, or a move was cut off before it was recorded"
        _record(registry, "observed", standing.get(CHAMPION), recorded, standing, at=at, actor=actor, reason=text)


def _record(
    registry: Registry,
    kind: str,
    version: int | None,
    before: dict[str, int],
    after: dict[str, int],
    *,
    at: datetime,
    actor: str,
    **why: Any,
) -> Event:
    tags = registry.version(version).tags if version is not None else {}
    document = {
        "event": kind,
        "model_version": version,
        "record": tags.get(RECORD),
        "manifest_sha256": tags.get("modelweld.dvc.manifest_sha256"),
        "gate": tags.get(GATE),
        "before": before,
        "aliases": after,
        **{key: value for key, value in why.items() if value is not None},
    }
    event = registry.ledger.append(document, at=at, actor=actor)
    if version is not None:
        # The ledger's head, kept where rewriting the branch does not reach.
        registry.client.set_model_version_tag(registry.name, str(version), LEDGER, event.digest)
    return event


def _judge(registry: Registry, version: int, champion: int | None, thresholds: Register) -> Decision:
    against = None if champion in (None, version) else champion
    decision = decide(
        registry.scoreboard(version), None if against is None else registry.scoreboard(against), thresholds
    )
    tags = {
        GATE: decision.verdict,
        REASONS: json.dumps(decision.as_document()["reasons"], ensure_ascii=False),
        AGAINST: str(against or ""),
        THRESHOLDS: thresholds.model_dump_json(),
    }
    for key, value in tags.items():
        registry.client.set_model_version_tag(registry.name, str(version), key, value)
    return decision


def _decision_of(version: ModelVersion) -> Decision:
    from modelweld.registry.gate import Reason

    reasons = tuple(Reason(**reason) for reason in json.loads(version.tags.get(REASONS, "[]")))
    return Decision(version.tags.get(GATE) == "passed", reasons)


def _require_gate(registry: Registry, version: int, champion: int | None, override: str | None) -> None:
    if override:
        return
    tags = registry.version(version).tags
    if GATE not in tags:
        hint = "`modelweld register` runs the gate; --override REASON does without and says so in the ledger"
        raise GateRefused(f"version {version} never passed the gate", where=registry.name, hint=hint)
    decision = _decision_of(registry.version(version))
    if champion is not None and champion != version and tags.get(AGAINST) != str(champion):
        # The champion has changed since: the old verdict compared it with another one.
        decision = _judge(registry, version, champion, Register.model_validate_json(tags[THRESHOLDS]))
    if not decision.passed:
        raise GateRefused(
            f"version {version} does not pass the gate: {'; '.join(decision.explain().splitlines())}",
            where=registry.name,
            hint="merge better, or --override REASON, which the ledger keeps",
        )


def _require_weights(registry: Registry, version: int) -> None:
    where = f"{registry.name} version {version}"
    materialise(DvcAddress.from_tags(registry.version(version).tags, where))


def _champion_before(registry: Registry, version: int) -> int | None:
    """The champion before `version`, by the ledger, if that version still exists."""
    line_of_succession: list[int] = []
    for event in registry.ledger.events():
        champion = event.aliases.get(CHAMPION)
        if champion is None or champion in line_of_succession[-1:]:
            continue
        if event.kind == "rolled_back" and champion in line_of_succession:
            del line_of_succession[line_of_succession.index(champion) + 1 :]
        else:
            line_of_succession.append(champion)
    if version not in line_of_succession:
        return None
    earlier = line_of_succession[: len(line_of_succession) - 1 - line_of_succession[::-1].index(version)]
    living = {int(item.version) for item in registry.client.search_model_versions(f"name = '{registry.name}'")}
    return next((number for number in reversed(earlier) if number in living and number != version), None)
