"""The pipeline's merges in several processes: the machine says how many, and the bytes do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modelweld.config.recipe import RECIPE_ADAPTER
from modelweld.stages.evaluate import evaluate
from modelweld.stages.merge import merge, merge_pipeline
from tests.conftest import Family, pipeline_params


def require_equal(one: Path, other: Path) -> None:
    names = {file.relative_to(one) for file in one.rglob("*")}
    assert names == {file.relative_to(other) for file in other.rglob("*")}
    for name in names:
        assert (one / name).is_dir() or (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_a_list_of_devices_is_for_the_merge_and_its_first_for_the_evaluation(
    fresh_family: Callable[..., Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = fresh_family()
    (family.root / "params.yaml").write_text(pipeline_params(family, baselines={}))
    monkeypatch.setenv("MODELWELD_DEVICE", "cpu")
    merge_pipeline(Path("params.yaml"), family.root)
    (family.root / "merged").rename(family.root / "alone")
    monkeypatch.setenv("MODELWELD_DEVICE", "cpu,cpu")
    merge_pipeline(Path("params.yaml"), family.root)
    require_equal(family.root / "alone", family.root / "merged")
    assert evaluate("colour", family.root / "params.yaml", family.root)


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
    require_equal(tmp_path / "alone", tmp_path / "shared")
