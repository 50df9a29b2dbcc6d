"""Every merge method by name.

    chosen = method("ties")
    merged = chosen.merge(deltas, chosen.parameters(), [1.0, 1.0], context=TensorContext("layer.0.weight"))

A method is the module of its name in this package, which declares itself as `METHOD`, or what an installed package
declares as an entry point (`modelweld.config.plugins`).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from modelweld.config.methods import METHODS
from modelweld.config.plugins import GROUP, plugins
from modelweld.errors import ConfigError, MergeError
from modelweld.methods.method import Method


@functools.cache
def methods() -> Mapping[str, Method[Any]]:
    """Every method by its name in a recipe: modelweld's own, then those that installed packages bring.

    Raises ConfigError for a package that declares something else.
    """
    modules = [import_module(f"modelweld.methods.{kind.model_fields['method'].default}") for kind in METHODS]
    found: dict[str, Method[Any]] = {module.METHOD.name: module.METHOD for module in modules}
    for plugin in plugins():
        if not isinstance(plugin.method, Method):
            raise ConfigError(
                f"the installed package {plugin.package} declares {plugin.name!r}, which is no modelweld Method",
                where=f"entry point {GROUP}",
                hint=f"pip uninstall {plugin.package}",
            )
        found[plugin.name] = plugin.method
    return MappingProxyType(found)


def provenance(name: str) -> dict[str, str]:
    """The version of a method for the manifest, and of a package's method which package it is from."""
    versions = {"version": method(name).version}
    plugin = next((plugin for plugin in plugins() if plugin.name == name), None)
    if plugin is not None:
        versions |= {"package": plugin.package, "package_version": plugin.version}
    return versions


def method(name: str) -> Method[Any]:
    """The method of that name; raises MergeError with the nearest one otherwise."""
    try:
        return methods()[name]
    except KeyError:
        close = difflib.get_close_matches(name, methods(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(methods())}"
        raise MergeError(f"unknown method {name!r}", where="method", hint=hint) from None
