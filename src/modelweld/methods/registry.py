"""Every merge method by name.

    chosen = method("ties")
    merged = chosen.merge(deltas, chosen.parameters(), [1.0, 1.0], context=TensorContext("layer.0.weight"))

A method is the module of its name in this package, which declares itself as `METHOD`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from modelweld.config.methods import METHODS
from modelweld.errors import MergeError
from modelweld.methods.method import Method


@functools.cache
def methods() -> Mapping[str, Method[Any]]:
    """Every method by its name in a recipe."""
    declared = [import_module(f"modelweld.methods.{kind.model_fields['method'].default}") for kind in METHODS]
    return MappingProxyType({module.METHOD.name: module.METHOD for module in declared})


def method(name: str) -> Method[Any]:
    """The method of that name; raises MergeError with the nearest one otherwise."""
    try:
        return methods()[name]
    except KeyError:
        close = difflib.get_close_matches(name, methods(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(methods())}"
        raise MergeError(f"unknown method {name!r}", where="method", hint=hint) from None
