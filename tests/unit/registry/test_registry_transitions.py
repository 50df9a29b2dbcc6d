"""The table of alias transitions: every command on every kind of aliases, without MLflow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelweld.errors import InputError
from modelweld.registry.transitions import TRANSITIONS, CommandName, champion_before, plan, rollback_target


@pytest.mark.parametrize(
    ("command", "before", "version", "after", "event"),
    [
        ("nominate", {}, 1, {"challenger": 1}, "challenger"),
        ("nominate", {"champion": 1, "challenger": 2}, 3, {"champion": 1, "challenger": 3}, "challenger"),
        ("refuse", {"champion": 1}, 2, {"champion": 1}, "refused"),
        ("promote", {"challenger": 1}, 1, {"champion": 1}, "promoted"),
        ("promote", {"champion": 1, "challenger": 2}, 2, {"champion": 2, "previous": 1}, "promoted"),
        (
            "promote",
            {"champion": 2, "previous": 1, "challenger": 4},
            3,
            {"champion": 3, "previous": 2, "challenger": 4},
            "promoted",
        ),
        ("promote", {"champion": 2, "previous": 1}, 2, {"champion": 2, "previous": 1}, "promoted"),
        ("promote_to_challenger", {"champion": 1}, 2, {"champion": 1, "challenger": 2}, "challenger"),
        ("roll_back", {"champion": 2, "previous": 1}, 1, {"champion": 1}, "rolled_back"),
        (
            "roll_back",
            {"champion": 2, "previous": 1, "challenger": 3},
            1,
            {"champion": 1, "challenger": 3},
            "rolled_back",
        ),
    ],
)
def test_what_a_command_does(
    command: CommandName, before: dict[str, int], version: int, after: dict[str, int], event: str
) -> None:
    given_aliases = dict(before)
    step = plan(command, before, version)
    assert (step.before, step.after, step.event) == (before, after, event)
    assert step.moves == (before != after)
    assert before == given_aliases, "the aliases that were passed in are left as they are"


def test_a_rollback_names_the_champion_before() -> None:
    step = plan("roll_back", {"champion": 3, "previous": 2}, 2, earlier=1)
    assert step.after == {"champion": 2, "previous": 1}


def test_what_each_command_requires() -> None:
    assert {name: row.requires for name, row in TRANSITIONS.items()} == {
        "nominate": (),
        "refuse": (),
        "promote": ("gate", "weights"),
        "promote_to_challenger": ("gate", "weights"),
        "roll_back": ("weights",),
    }


def test_a_rollback_without_a_previous_champion_is_refused() -> None:
    assert rollback_target({"champion": 2, "previous": 1}, "demo") == 1
    with pytest.raises(InputError, match="no previous champion"):
        rollback_target({"champion": 2}, "demo")


PROMOTED = [("promoted", 1), ("promoted", 2), ("promoted", 3)]


@pytest.mark.parametrize(
    ("history", "version", "existing", "earlier"),
    [
        ([], 1, {1}, None),
        (PROMOTED, 2, {1, 2, 3}, 1),
        (PROMOTED, 3, {1, 2, 3}, 2),
        (PROMOTED, 3, {1, 3}, 1),
        (PROMOTED, 1, {1, 2, 3}, None),
        ([*PROMOTED, ("rolled_back", 2)], 1, {1, 2, 3}, None),
        ([*PROMOTED, ("rolled_back", 2), ("promoted", 4)], 2, {1, 2, 3, 4}, 1),
        ([*PROMOTED, ("challenger", 3), ("refused", 3)], 3, {1, 2, 3}, 2),
        ([("challenger", None), *PROMOTED], 2, {1, 2, 3}, 1),
    ],
)
def test_the_champion_before(
    history: list[tuple[str, int | None]], version: int, existing: set[int], earlier: int | None
) -> None:
    assert champion_before(version, history, existing) == earlier


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_a_rollback_undoes_a_promotion(promotions: list[int]) -> None:
    aliases: dict[str, int] = {}
    history: list[tuple[str, int | None]] = []
    for version in promotions:
        step = plan("promote", aliases, version)
        if step.moves:
            history.append((step.event, version))
        before, aliases = aliases, step.after
        if step.moves and "champion" in before:
            assert aliases["previous"] == before["champion"]
            target = rollback_target(aliases, "demo")
            earlier = champion_before(target, history, set(range(1, 6)))
            assert plan("roll_back", aliases, target, earlier).after["champion"] == before["champion"]
