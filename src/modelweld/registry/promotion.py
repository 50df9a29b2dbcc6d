"""Moving the aliases: the gate nominates a challenger, a person promotes it, one command rolls back.

Every move happens under a lock of the repository, on aliases read inside it, after the version's weights were brought
here and checked, and ends as one event of the ledger. What the ledger does not explain (an alias moved by hand, a crash
between the alias and its event) is recorded first, as `observed`.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from modelweld import settings
from modelweld.config import Register
from modelweld.errors import GateRefused, InputError, WorkspaceError
from modelweld.formats.address import TAG_PREFIX, DvcAddress
from modelweld.formats.decision import from_tag, to_tag
from modelweld.formats.scores import RegisteredScores
from modelweld.registry import aliases
from modelweld.registry.aliases import CHALLENGER, CHAMPION
from modelweld.registry.connection import connect, guarded, tracking_uri
from modelweld.registry.gate import Decision, Scoreboard, decide
from modelweld.registry.ledger import Event, Ledger
from modelweld.registry.materialise import materialise
from modelweld.registry.registration import RECORD, SCORES
from modelweld.registry.transitions import (
    TRANSITIONS,
    CommandName,
    Step,
    champion_before,
    plan,
    rollback_target,
)
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

    def versions(self) -> set[int]:
        """The numbers of the versions that exist."""
        return {int(item.version) for item in self.client.search_model_versions(f"name = '{self.name}'")}

    def scoreboard(self, number: int) -> Scoreboard:
        """The scores a version was registered with."""
        found = json.loads(self.version(number).tags.get(SCORES, "{}"))
        return {
            task: RegisteredScores.from_data(one, f"{self.name} version {number}: {SCORES}")
            for task, one in found.items()
        }


@dataclass(frozen=True)
class Transition:
    """What a command did to the aliases; `event` is None when they stood there already."""

    name: str
    version: int
    before: dict[str, int]
    after: dict[str, int]
    event: Event | None

    def data(self) -> dict[str, Any]:
        """The transition for JSON."""
        return {
            "name": self.name,
            "version": self.version,
            "before": self.before,
            "aliases": self.after,
            "event": None if self.event is None else self.event.data(),
        }


def open_registry(root: Path, name: str, uri: str | None = None) -> Registry:
    """The registry of `name`; RegistryUnavailable when MLflow does not answer, WorkspaceError without a repository."""
    where = uri or tracking_uri(root)
    return Registry(root, name, where, connect(where), Ledger(root, name))


def current_actor(root: Path) -> str:
    """Who acts: MODELWELD_ACTOR, else git's user, else the operating system's."""
    given = settings.actor()
    if given:
        return given
    name, email = try_git(root, "config", "user.name"), try_git(root, "config", "user.email")
    return f"{name} <{email}>" if name and email else name or email or getpass.getuser()


def nominate(registry: Registry, version: int, thresholds: Register, *, at: datetime, actor: str) -> Decision:
    """The gate's decision on a version, written to its tags; `challenger` points at it when it passed.

    A version is decided on once: a second call returns the first decision and moves nothing.
    """
    with _locked(registry, at, actor) as current:
        earlier = [event for event in registry.ledger.events() if event.version == version]
        if any(event.kind in ("challenger", "refused") for event in earlier):
            return _decision_of(registry.version(version))
        decision = _judge(registry, version, current.get(CHAMPION), thresholds)
        step = plan("nominate" if decision.passed else "refuse", current, version)
        _apply(registry, step, at=at, actor=actor, reasons=[reason.text for reason in decision.reasons])
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
    command: CommandName = "promote" if target == CHAMPION else "promote_to_challenger"
    with _locked(registry, at, actor) as current:
        step = plan(command, current, aliases.resolve(registry.client, registry.name, wanted))
        if not step.moves:
            return Transition(registry.name, step.version, step.before, step.after, None)
        _require(registry, command, step, override)
        return _apply(registry, step, at=at, actor=actor, override=override)


def rollback(registry: Registry, *, at: datetime, actor: str, reason: str | None = None) -> Transition:
    """Make the previous champion champion again; `previous` becomes the one before it, so a second call goes further.

    InputError when there is nothing to go back to; weights are checked as for a promotion, the gate is not asked.
    """
    with _locked(registry, at, actor) as current:
        version = rollback_target(current, registry.name)
        history = ((event.kind, event.aliases.get(CHAMPION)) for event in registry.ledger.events())
        step = plan("roll_back", current, version, champion_before(version, history, registry.versions()))
        _require(registry, "roll_back", step)
        return _apply(registry, step, at=at, actor=actor, reason=reason)


def _require(registry: Registry, command: CommandName, step: Step, override: str | None = None) -> None:
    """Raise what stands against `step`: a gate that did not pass, weights that are not what was registered."""
    requires = TRANSITIONS[command].requires
    if "gate" in requires and not override:
        champion = step.before.get(CHAMPION)
        if _judged_against_another(registry, step.version, champion):
            tags = registry.version(step.version).tags
            _judge(registry, step.version, champion, Register.model_validate_json(tags[THRESHOLDS]))
        _require_passed(registry, step.version)
    if "weights" in requires:
        _require_weights(registry, step.version)


def _apply(registry: Registry, step: Step, *, at: datetime, actor: str, **why: Any) -> Transition:
    """Write the aliases that `step` moves, then its event."""
    if step.moves:
        aliases.write(registry.client, registry.name, step.after)
    event = _record(registry, step.event, step.version, step.before, step.after, at=at, actor=actor, **why)
    return Transition(registry.name, step.version, step.before, step.after, event)


@contextmanager
def _locked(registry: Registry, at: datetime, actor: str) -> Iterator[dict[str, int]]:
    """The aliases, read under the lock of this model; what the ledger does not explain is recorded first."""
    directory = (registry.root / line(registry.root, "rev-parse", "--git-common-dir")).resolve() / "modelweld"
    directory.mkdir(exist_ok=True)
    try:
        with FileLock(directory / f"registry-{registry.name}.lock", timeout=LOCK_TIMEOUT_S), guarded(registry.uri):
            current = registry.aliases()
            _observe(registry, current, at=at, actor=actor)
            yield current
    except Timeout as error:
        raise WorkspaceError(
            "another promotion or rollback has not ended", where=registry.name, hint="wait for it and try again"
        ) from error


def _observe(registry: Registry, current: dict[str, int], *, at: datetime, actor: str) -> None:
    events = registry.ledger.events()
    recorded = events[-1].aliases if events else {}
    if recorded != current:
        text = "the aliases were moved outside of modelweld, or a move was cut off before it was recorded"
        _record(registry, "observed", current.get(CHAMPION), recorded, current, at=at, actor=actor, reason=text)


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
        "manifest_sha256": tags.get(f"{TAG_PREFIX}manifest_sha256"),
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
        REASONS: to_tag(decision.reasons),
        AGAINST: str(against or ""),
        THRESHOLDS: thresholds.model_dump_json(),
    }
    for key, value in tags.items():
        registry.client.set_model_version_tag(registry.name, str(version), key, value)
    return decision


def _decision_of(version: ModelVersion) -> Decision:
    reasons = from_tag(version.tags.get(REASONS, "[]"), f"{version.name} version {version.version}: {REASONS}")
    return Decision(version.tags.get(GATE) == "passed", reasons)


def _judged_against_another(registry: Registry, version: int, champion: int | None) -> bool:
    """Whether the champion has changed since the gate compared `version` with it."""
    tags = registry.version(version).tags
    return GATE in tags and champion not in (None, version) and tags.get(AGAINST) != str(champion)


def _require_passed(registry: Registry, version: int) -> None:
    """Raise GateRefused unless the gate's last decision on `version` is that it passed."""
    tags = registry.version(version).tags
    if GATE not in tags:
        hint = "`modelweld register` runs the gate; --override REASON does without and says so in the ledger"
        raise GateRefused(f"version {version} never passed the gate", where=registry.name, hint=hint)
    decision = _decision_of(registry.version(version))
    if not decision.passed:
        raise GateRefused(
            f"version {version} does not pass the gate: {'; '.join(decision.explain().splitlines())}",
            where=registry.name,
            hint="merge better, or --override REASON, which the ledger keeps",
        )


def _require_weights(registry: Registry, version: int) -> None:
    where = f"{registry.name} version {version}"
    materialise(DvcAddress.from_tags(registry.version(version).tags, where))
