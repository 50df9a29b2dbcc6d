"""What each kind of task does, one file per kind; `modelweld.kinds` is the table that names them.

    kind_of("text-classification").read(spec)

A kind is opened on first use, so that images are decoded, and their libraries imported, only where there are some.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from modelweld.errors import ConfigError
from modelweld.kinds import KINDS

if TYPE_CHECKING:
    from modelweld.evaluation.kinds.base import TaskKind

__all__ = ["kind_of"]


def kind_of(name: str) -> TaskKind:
    """The behaviour of a kind; ConfigError naming the known ones for any other name."""
    if name not in KINDS:
        raise ConfigError(f"no kind of task is called {name!r}", hint=f"one of: {', '.join(KINDS)}")
    kind: TaskKind = import_module(KINDS[name].module).KIND
    return kind
