"""What each command does to a model's aliases: a table of pure functions, which knows no MLflow, git or clock.

    step = plan("promote", {"champion": 1, "challenger": 2}, version=2)
    step.after                # {"champion": 2, "previous": 1}
    step.event                # "promoted", the kind of event that the ledger gets
    TRANSITIONS["promote"].requires   # what must hold before the aliases are written

`plan` never writes: `modelweld.registry.promotion` reads the aliases under a lock, checks the requirements, writes
`after` and appends the event.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from modelweld.errors import InputError
from modelweld.registry.aliases import CHALLENGER, CHAMPION, PREVIOUS

Aliases = Mapping[str, int]
Requirement = Literal["gate", "weights"]
EventKind = Literal["challenger", "refused", "promoted", "rolled_back"]
CommandName = Literal["nominate", "refuse", "promote", "promote_to_challenger", "roll_back"]


@dataclass(frozen=True)
class Transition:
    """One row of the table: `requires` must hold first, `move` gives the new aliases, `event` is the ledger's kind.

    `move(aliases, version, earlier)`: `earlier` is the champion before `version`, where the command asks for it.
    """

    requires: tuple[Requirement, ...]
    move: Callable[[Aliases, int, int | None], dict[str, int]]
    event: EventKind


@dataclass(frozen=True)
class Step:
    """One command applied to the aliases of one model."""

    version: int
    before: dict[str, int]
    after: dict[str, int]
    event: EventKind

    @property
    def moves(self) -> bool:
        """Whether an alias points elsewhere afterwards."""
        return self.before != self.after


def plan(command: CommandName, aliases: Aliases, version: int, earlier: int | None = None) -> Step:
    """What `command` on `version` does to `aliases`, which are left as they are."""
    row = TRANSITIONS[command]
    return Step(version, dict(aliases), row.move(aliases, version, earlier), row.event)


def rollback_target(aliases: Aliases, model: str) -> int:
    """The version that a rollback makes champion again; InputError when there is none."""
    if PREVIOUS not in aliases:
        hint = "promote a version that you trust: `modelweld promote VERSION`"
        raise InputError("there is no previous champion to go back to", where=model, hint=hint)
    return aliases[PREVIOUS]


def champion_before(version: int, history: Iterable[tuple[str, int | None]], existing: Collection[int]) -> int | None:
    """The champion before `version` among the `existing` versions; None when there was none.

    `history` holds, for every event of the ledger in order, its kind and the champion after it. A rollback takes the
    champions after its target out of the line of succession, so that two rollbacks go back twice.
    """
    succession: list[int] = []
    for kind, champion in history:
        if champion is None or champion in succession[-1:]:
            continue
        if kind == "rolled_back" and champion in succession:
            del succession[succession.index(champion) + 1 :]
        else:
            succession.append(champion)
    if version not in succession:
        return None
    earlier = succession[: len(succession) - 1 - succession[::-1].index(version)]
    return next((number for number in reversed(earlier) if number in existing and number != version), None)


def _to_challenger(aliases: Aliases, version: int, _: int | None) -> dict[str, int]:
    return {**aliases, CHALLENGER: version}


def _unmoved(aliases: Aliases, _: int, __: int | None) -> dict[str, int]:
    return dict(aliases)


def _to_champion(aliases: Aliases, version: int, _: int | None) -> dict[str, int]:
    """The champion so far becomes previous; a challenger that is promoted is challenger no longer."""
    if aliases.get(CHAMPION) == version:
        return dict(aliases)
    after = {alias: number for alias, number in aliases.items() if (alias, number) != (CHALLENGER, version)}
    if CHAMPION in aliases:
        after[PREVIOUS] = aliases[CHAMPION]
    return {**after, CHAMPION: version}


def _back(aliases: Aliases, version: int, earlier: int | None) -> dict[str, int]:
    """The previous champion is champion again; the one before it becomes previous, so that a second call goes on."""
    after = {alias: number for alias, number in aliases.items() if alias != PREVIOUS}
    if earlier is not None:
        after[PREVIOUS] = earlier
    return {**after, CHAMPION: version}


TRANSITIONS: Mapping[CommandName, Transition] = {
    "nominate": Transition((), _to_challenger, "challenger"),
    "refuse": Transition((), _unmoved, "refused"),
    "promote": Transition(("gate", "weights"), _to_champion, "promoted"),
    "promote_to_challenger": Transition(("gate", "weights"), _to_challenger, "challenger"),
    # The gate is not asked: this version was champion already, and a rollback must not wait for a comparison.
    "roll_back": Transition(("weights",), _back, "rolled_back"),
}
