"""The report of an aligned merge: heat maps, the search for alpha, layers, and the landscape it computes on request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from modelweld.alignment.landscape import landscape, stored_landscape
from modelweld.errors import ConfigError, InputError
from modelweld.stages.evaluate import evaluate
from modelweld.stages.merge import merge_pipeline
from modelweld.stages.report import report
from modelweld.symmetry import derive_spec
from tests.conftest import Family, build_family, pipeline_params

STEPS = 5


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELWELD_PROJECT_ROOT", raising=False)
    monkeypatch.setenv("MODELWELD_DEVICE", "cpu")


def merged(root: Path, **recipe: Any) -> Path:
    family = Family(root, {"colour": [], "animal": []})
    (root / "params.yaml").write_text(pipeline_params(family, merge=recipe, baselines={}))
    merge_pipeline(root / "params.yaml", root)
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family(tmp_path_factory.mktemp("report")).root


@pytest.fixture
def project(plain: Path, tmp_path: Path) -> Path:
    """The family with the second expert in another order of units, merged by MuDSC."""
    root = Path(shutil.copytree(plain, tmp_path / "project"))
    model = hf.BertForSequenceClassification.from_pretrained(root / "models" / "animal")
    spec = derive_spec(model.config)
    model.load_state_dict(spec.apply(model.state_dict(), spec.random(1)))
    model.save_pretrained(root / "models" / "animal")
    align = {"rows": 32, "max_length": 16, "alpha": "auto", "grid": [0.5, 1.0], "validation_rows": 20}
    return merged(root, method="mudsc", align=align)


def test_the_page_shows_what_alignment_did_and_the_landscape(project: Path) -> None:
    evaluate("animal", project / "params.yaml", project)
    page = Path(report(project)["report"])
    plots = {path.name for path in page.parent.glob("*.png")}
    assert {"alpha.png", "identity.png", "similarity-1.png", "similarity-2.png", "similarity-3.png"} <= plots
    assert "landscape.png" not in plots
    assert "<h2>Alignment</h2>" in page.read_text(encoding="utf-8")
    report(project, steps=STEPS)
    assert "<h2>Landscape</h2>" in page.read_text(encoding="utf-8")
    before = page.read_bytes()
    report(project)
    assert page.read_bytes() == before, "the landscape that was computed is kept"
    merged(project, method="mudsc")
    assert stored_landscape(project) is None, "another merge has another landscape"


def test_similarities_are_kept_before_and_after(project: Path) -> None:
    document = json.loads((project / "merged" / "alignment.json").read_text())
    for shown in document["similarity"]:
        assert len(shown["before"]) == len(shown["after"]) == len(shown["units"])
        assert shown["matched"]["after"] > shown["matched"]["before"] + 0.2
        assert shown["models"] == ["colour", "animal"]


def test_the_plane_holds_its_corners(project: Path) -> None:
    """At the experts and the merge the plane gives what these models score by themselves."""
    found = landscape(project / "params.yaml", project, steps=STEPS, rows=20)
    assert found["points"]["colour"] == [0.0, 0.0]
    assert found["points"]["animal"][0] > found["points"]["merge"][0]
    assert found["points"]["merge"][1] > 0.0
    assert found["tasks"].keys() == {"colour", "animal"}
    from modelweld.alignment.plane import Order, Plane, corners_of
    from modelweld.checkpoints import Checkpoint
    from modelweld.config import load_recipe_or_params
    from modelweld.engine import open_inputs

    recipe = load_recipe_or_params(project / "params.yaml")
    assert recipe.alignment is not None
    with open_inputs(recipe) as inputs, Checkpoint.open(project / "merged") as weights:
        order = Order.of(recipe.alignment, inputs, project / "merged", project)
        plane = Plane.through(*corners_of(inputs, order, weights))
        animal = inputs.experts[1]
        state = plane.at(plane.right, 0.0, 1, animal.name_map.names)
        for name, tensor in state.items():
            assert (tensor - animal.checkpoint.read(name)).abs().max() < 1e-5, name
        state = plane.at(plane.over, plane.up, 1, animal.name_map.names)
        model = hf.BertForSequenceClassification.from_pretrained(animal.checkpoint.path)
        model.load_state_dict(state, strict=False)
    import torch

    from modelweld import load

    ids = torch.arange(5, 15)[None]
    wanted = load(project / "merged", task="animal")(ids).logits
    torch.testing.assert_close(model.eval()(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_merge_on_the_line_is_seen_from_the_base(plain: Path, tmp_path: Path) -> None:
    root = merged(Path(shutil.copytree(plain, tmp_path / "project")), method="average")
    found = landscape(root / "params.yaml", root, steps=3, rows=20)
    assert set(found["points"]) == {"colour", "animal", "merge", "base"}
    assert found["points"]["merge"][1] == pytest.approx(0.0, abs=1e-3)
    assert found["points"]["merge"][0] == pytest.approx(found["points"]["animal"][0] / 2, rel=1e-3)


def test_what_spans_no_plane_is_refused(project: Path) -> None:
    merged(project, method="mudsc", align={"mode": "zip", "rows": 32, "max_length": 16})
    with pytest.raises(ConfigError, match="zipped merge"):
        landscape(project / "params.yaml", project, steps=3)
    (project / ".modelweld" / "landscape.json").write_text("cut sho")
    with pytest.raises(InputError, match="no landscape"):
        stored_landscape(project)
