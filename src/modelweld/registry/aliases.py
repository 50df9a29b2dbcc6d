"""challenger, champion, previous: what they point at, in one spelling.

MLflow's aliases are case-sensitive and have no history: `Champion` beside `champion` would be two truths, so it is
refused, and the history is the ledger's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from modelweld.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHALLENGER = "challenger"
CHAMPION = "champion"
PREVIOUS = "previous"
OURS = (CHALLENGER, CHAMPION, PREVIOUS)


def read(client: MlflowClient, name: str) -> dict[str, int]:
    """Which version each of our aliases points at; InputError when one stands in two spellings."""
    from mlflow.exceptions import MlflowException

    from modelweld.registry.connection import absent

    try:
        found = client.get_registered_model(name).aliases
    except MlflowException as error:
        if absent(error):
            raise unknown_model(name) from error
        raise
    for alias in found:
        if alias not in OURS and alias.lower() in OURS:
            raise InputError(
                f"the alias {alias!r} differs from {alias.lower()!r} by case only",
                where=name,
                hint=f"delete it: MlflowClient().delete_registered_model_alias({name!r}, {alias!r})",
            )
    return {alias: int(found[alias]) for alias in OURS if alias in found}


def write(client: MlflowClient, name: str, wanted: dict[str, int]) -> None:
    """Make our aliases point where `wanted` says, and nowhere else; those that must not dangle are moved first."""
    current = read(client, name)
    for alias in (PREVIOUS, CHAMPION, CHALLENGER):
        if alias in wanted and current.get(alias) != wanted[alias]:
            client.set_registered_model_alias(name, alias, str(wanted[alias]))
    for alias in current.keys() - wanted.keys():
        client.delete_registered_model_alias(name, alias)


def resolve(client: MlflowClient, name: str, wanted: str) -> int:
    """The number of the version that `3`, `v3` or an alias names; InputError when there is none."""
    from mlflow.exceptions import MlflowException

    from modelweld.registry.connection import absent

    word = wanted.strip().removeprefix("@").lower()
    aliases = read(client, name)
    if word in aliases:
        return aliases[word]
    if not re.fullmatch(r"v?[1-9][0-9]*", word):
        current = ", ".join(f"{alias} → {number}" for alias, number in aliases.items()) or "none is set"
        raise InputError(
            f"no version or alias {wanted!r}", where=name, hint=f"a version's number, or an alias: {current}"
        )
    number = int(word.removeprefix("v"))
    try:
        client.get_model_version(name, str(number))
    except MlflowException as error:
        if absent(error):
            raise InputError(
                f"there is no version {number}", where=name, hint="`mlflow ui` lists the versions"
            ) from error
        raise
    return number


def unknown_model(name: str) -> InputError:
    """The error for a model that nobody registered."""
    return InputError("no such registered model", where=name, hint="`modelweld register`, or name another with --name")
