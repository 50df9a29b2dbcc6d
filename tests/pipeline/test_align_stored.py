"""Aligned merges of models whose tensors go by other names on disk than in memory, or are stored in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from modelweld.checkpoints.loading import load
from modelweld.errors import MergeError
from modelweld.stages.merge import merge
from modelweld.symmetry import derive_spec
from tests.support.architectures import build


def stored(name: str, root: Path, **options: bool) -> Path:
    """A model and a permuted copy of it as directories, and a recipe that averages them aligned."""
    model, config = build(name)
    spec, origin = derive_spec(config), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for folder, state in (("first", origin), ("second", spec.apply(origin, spec.random(3)))):
        model.load_state_dict(state)
        model.save_pretrained(root / folder, **options)
    models = {folder: {"path": str(root / folder)} for folder in ("first", "second")}
    (root / "recipe.yaml").write_text(yaml.safe_dump({"method": "mudsc", "models": models}))
    return root / "recipe.yaml"


@pytest.mark.parametrize(("name", "original"), [("vit", True), ("modernbert", True), ("mixtral", False)])
def test_a_permuted_copy_on_disk_merges_back(name: str, original: bool, tmp_path: Path) -> None:
    recipe = stored(name, tmp_path, save_original_format=original)
    merge(recipe, tmp_path / "merged", "cpu", root=tmp_path, staging=tmp_path / "staging")
    document = json.loads((tmp_path / "merged" / "alignment.json").read_text())
    assert document["identity_share"] < 0.5
    expected, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "merged"))
    backbone = [key for key in expected if not key.startswith(("classifier", "head"))]
    for key in backbone:
        tensor = expected[key]
        assert (found[key] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), key
    load(tmp_path / "merged")


def test_experts_that_are_stored_one_by_one_are_refused_with_what_helps(tmp_path: Path) -> None:
    recipe = stored("mixtral", tmp_path)
    with pytest.raises(MergeError, match=r"experts\.0\.w1\.weight.*no tensor of its architecture by itself") as caught:
        merge(recipe, tmp_path / "merged", "cpu", root=tmp_path, staging=tmp_path / "staging")
    assert "save_original_format=False" in str(caught.value.hint)
    assert not (tmp_path / "merged").exists()
