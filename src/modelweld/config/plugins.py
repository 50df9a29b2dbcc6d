"""Methods that installed packages bring, by the entry point group `modelweld.methods`.

A package declares one `modelweld.methods.method.Method` per entry point, whose name is the method's name in a recipe:

    [project.entry-points."modelweld.methods"]
    geometric_median = "modelweld_geometric:METHOD"

They are loaded when the first recipe, schema or table is asked for. A recipe names methods and never modules.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args, get_origin

from modelweld.config.methods import METHODS, MethodParameters
from modelweld.errors import ConfigError

GROUP = "modelweld.methods"
_NAME = re.compile(r"^[a-z][a-z0-9_]*$")


@dataclass(frozen=True)
class Plugin:
    """A method of another package: its declaration, its parameters, and the distribution it comes from."""

    name: str
    method: Any
    parameters: type[MethodParameters]
    package: str
    version: str


@functools.cache
def plugins() -> tuple[Plugin, ...]:
    """Every method that an installed package brings, by name.

    Raises ConfigError naming the package for a declaration that cannot be loaded or is no method, and for a name that
    modelweld or another package has already.
    """
    found: dict[str, Plugin] = {}
    own = {kind.model_fields["method"].default for kind in METHODS}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, _package(point))):
        taken = "modelweld" if point.name in own else found[point.name].package if point.name in found else None
        if taken is not None:
            raise _refused(point, f"brings a method {point.name!r}, which {taken} has already")
        found[point.name] = _loaded(point)
    return tuple(found.values())


def parameter_kinds() -> tuple[type[MethodParameters], ...]:
    """The parameters of every method there is: modelweld's own, then those that packages bring."""
    return METHODS + tuple(plugin.parameters for plugin in plugins())


def _loaded(point: EntryPoint) -> Plugin:
    if not _NAME.match(point.name):
        raise _refused(point, f"names a method {point.name!r}, which is not lower case with underscores")
    try:
        declared = point.load()
    except Exception as error:
        # What a foreign module raises when it is imported is its own matter; whose it is has to be said.
        raise _refused(point, f"brings a method {point.name!r} that cannot be loaded: {error}") from error
    kind = getattr(declared, "parameters", None)
    if not (isinstance(kind, type) and issubclass(kind, MethodParameters)):
        raise _refused(point, f"declares {point.value} as a method, and it has no `parameters` (a MethodParameters)")
    field = kind.model_fields["method"]
    if (
        field.default != point.name
        or get_origin(field.annotation) is not Literal
        or get_args(field.annotation) != (point.name,)
    ):
        wanted = f'method: Literal["{point.name}"] = "{point.name}"'
        raise _refused(point, f"declares {point.value} as {point.name!r}, and its parameters do not say `{wanted}`")
    version = point.dist.version if point.dist else "unknown"
    return Plugin(point.name, declared, kind, _package(point), version)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.module


def _refused(point: EntryPoint, what: str) -> ConfigError:
    package = _package(point)
    return ConfigError(
        f"the installed package {package} {what}", where=f"entry point {GROUP}", hint=f"pip uninstall {package}"
    )
