"""Suites as files: those that modelweld ships, changed by a project's own `expectations/` folder.

A suite is Great Expectations' own vocabulary (type, kwargs, severity, `$PARAMETER`) with two things more: how a failure
is fixed, and under which merge methods it is only a warning (`lifted_by`).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from modelweld.config.strict import Strict
from modelweld.errors import ConfigError
from modelweld.validation.tables import SUITES

__all__ = ["FOLDER", "Expectation", "Suite", "load_suite", "load_suites"]

FOLDER = "expectations"
PLACES = ("subject", "name", "path")


class Expectation(Strict):
    """One thing that must hold of a table; a failure that is `critical` stops the run."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    type: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    severity: Literal["critical", "warning"] = "critical"
    lifted_by: tuple[str, ...] = ()
    hint: str

    @model_validator(mode="before")
    @classmethod
    def _accept_old_name(cls, written: Any) -> Any:
        # `hint` was called `mend` in 0.1.0: suites that users wrote then are still read.
        if isinstance(written, dict) and "mend" in written and "hint" not in written:
            return {("hint" if key == "mend" else key): value for key, value in written.items()}
        return written


class Suite(Strict):
    """A suite file as written: its own expectations, or changes to the shipped ones."""

    table: Literal[SUITES]  # type: ignore[valid-type]
    extends: Literal["default"] | None = None
    without: tuple[str, ...] = ()
    expectations: tuple[Expectation, ...] = ()


def load_suites(project: Path, lifting: str | None = None) -> dict[str, tuple[Expectation, ...]]:
    """Every suite for this project; `lifting` names the merge method whose `lifted_by` turns failures into warnings.

    Raises ConfigError for a file in the project's folder that is no suite: a typing error in a file's name must not
    silently leave the shipped rules in force.
    """
    for path in sorted((project / FOLDER).glob("*")):
        if path.suffix in {".yaml", ".yml", ".json"} and path.name not in {f"{kind}.yaml" for kind in SUITES}:
            names = ", ".join(f"{kind}.yaml" for kind in SUITES)
            raise ConfigError("there is no suite of this name", where=str(path), hint=f"the suites are {names}")
    return {kind: load_suite(kind, project, lifting) for kind in SUITES}


def load_suite(kind: str, project: Path, lifting: str | None = None) -> tuple[Expectation, ...]:
    """The expectations for one kind of table, in the order of their files."""
    shipped = files("modelweld.validation") / "suites" / f"{kind}.yaml"
    own = project / FOLDER / f"{kind}.yaml"
    default = _parse(kind, shipped.read_text(encoding="utf-8"), str(shipped))
    chosen = {item.id: item for item in default.expectations}
    if own.is_file():
        suite = _parse(kind, own.read_text(encoding="utf-8"), str(own))
        if suite.extends is None:
            chosen = {}
        for unwanted in suite.without:
            if chosen.pop(unwanted, None) is None:
                raise ConfigError(
                    f"without: no expectation {unwanted!r} to leave out",
                    where=str(own),
                    hint=f"the shipped ones are {', '.join(item.id for item in default.expectations)}",
                )
        chosen.update({item.id: item for item in suite.expectations})
    return tuple(
        item.model_copy(update={"severity": "warning"}) if lifting in item.lifted_by else item
        for item in chosen.values()
    )


def _parse(kind: str, text: str, where: str) -> Suite:
    try:
        suite = Suite.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", where=where, hint="fix it at the line it names") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(wrong, where=where, hint="docs/validation.md shows a suite file") from error
    if suite.table != kind:
        raise ConfigError(f"table: {suite.table} in a file for {kind}", where=where, hint=f"write `table: {kind}`")
    ids = [item.id for item in suite.expectations]
    if repeated := sorted({name for name in ids if ids.count(name) > 1}):
        raise ConfigError(f"two expectations share the id {repeated[0]!r}", where=where, hint="give each its own id")
    for item in suite.expectations:
        try:
            item.hint.format_map(dict.fromkeys(PLACES, ""))
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"{item.id}.hint: {error} cannot be filled in", where=where, hint="use {subject}, {name} or {path}"
            ) from error
    return suite
