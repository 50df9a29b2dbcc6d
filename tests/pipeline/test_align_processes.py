"""Aligned merges in several processes: each reads its experts through the places that were found once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modelweld.config.recipe import RECIPE_ADAPTER
from modelweld.stages.merge import merge
from tests.conftest import Family


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["align", "zip"])
def test_aligned_experts_are_merged_alike_in_two_processes(
    tmp_path: Path, fresh_family: Callable[..., Family], mode: str
) -> None:
    # Experts of two seeds share no initialisation, so that units do move.
    one, other = fresh_family("one"), fresh_family("other", seed=5)
    models = {"colour": {"path": str(one.expert("colour"))}, "animal": {"path": str(other.expert("animal"))}}
    recipe = RECIPE_ADAPTER.validate_python({"method": "mudsc", "models": models, "align": {"mode": mode}})
    merge(recipe, tmp_path / "alone", "cpu", root=tmp_path)
    merge(recipe, tmp_path / "shared", "cpu,cpu", root=tmp_path)
    for file in sorted((tmp_path / "alone").rglob("*")):
        twin = tmp_path / "shared" / file.relative_to(tmp_path / "alone")
        assert file.is_dir() or file.read_bytes() == twin.read_bytes(), twin.name
