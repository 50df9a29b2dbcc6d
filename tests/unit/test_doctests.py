"""The examples in docstrings: they run, and what the documentation leads to has one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import modelweld

PACKAGE = Path(modelweld.__file__).parent
# Modules are found by their text: importing all of them to look would take longer than the examples.
WITH_EXAMPLES = sorted(
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in PACKAGE.rglob("*.py")
    if ">>> " in file.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_give_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Examples may write files by plain names.
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0


def test_what_people_begin_with_has_an_example() -> None:
    from modelweld.checkpoints import Checkpoint
    from modelweld.checkpoints.loading import load
    from modelweld.config import load_recipe
    from modelweld.symmetry import Spec, align, derive_spec

    for documented in (load_recipe, Checkpoint.open, load, derive_spec, align, Spec.random, Spec.apply):
        assert ">>> " in str(documented.__doc__), documented.__qualname__
