"""Loops over numbers, compiled to machine code at their first call and kept on disk for the next process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

# Strict arithmetic: a result must not depend on what a compiler may reorder or fuse. Other threads run meanwhile.
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": False}


def compiled(function: F) -> F:
    """The function as machine code, for arrays and numbers only; its Python text is what it does."""
    try:
        made: F = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        # Neither beside the module nor in the user's cache is there a place to write: compile in every process.
        made = njit(**_OPTIONS)(function)
    return made
