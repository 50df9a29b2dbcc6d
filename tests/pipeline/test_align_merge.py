"""Aligned merges through the engine: real checkpoints on disk, permuted, and what the merged directory says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

import modelweld
from modelweld.config import load_recipe
from modelweld.errors import ConfigError, MergeError
from modelweld.stages.merge import MergeReport, merge
from modelweld.symmetry import derive_spec
from tests.conftest import Family, build_family

Weld = Callable[..., MergeReport]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def family(plain: Family, tmp_path: Path) -> Family:
    """The family with its second expert's units in another order: the same function, other weights."""
    root = tmp_path / "family"
    shutil.copytree(plain.root, root)
    found = Family(root, plain.tasks)
    model = hf.BertForSequenceClassification.from_pretrained(found.expert("animal"))
    spec = derive_spec(model.config)
    model.load_state_dict(spec.apply(model.state_dict(), spec.random(1)))
    model.save_pretrained(found.expert("animal"))
    return found


@pytest.fixture
def weld(family: Family) -> Weld:
    def run(name: str = "merged", *, based: bool = True, **recipe: Any) -> MergeReport:
        document: dict[str, Any] = {
            "method": "mudsc",
            "models": {task: {"path": str(family.expert(task))} for task in family.tasks},
            **({"base": str(family.base)} if based else {}),
            **recipe,
        }
        file = family.root / f"{name}.yaml"
        file.write_text(yaml.safe_dump(document, sort_keys=False))
        return merge(file, family.root / name, "cpu", root=family.root, staging=family.root / "staging")

    return run


def rows(family: Family, split: str = "train") -> dict[str, Any]:
    return {task: {"dataset": str(family.dataset(task)), "split": split} for task in family.tasks}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def average(plain: Family, out: Path) -> Path:
    recipe = {
        "method": "average",
        "base": str(plain.base),
        "models": {task: {"path": str(plain.expert(task))} for task in plain.tasks},
    }
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    merge(file, out, "cpu", root=out.parent, staging=out.parent / "staging")
    return out


@pytest.mark.parametrize("based", [True, False])
def test_a_permuted_expert_merges_as_if_it_had_never_been_permuted(
    plain: Family, family: Family, weld: Weld, tmp_path: Path, based: bool
) -> None:
    expected = average(plain, tmp_path / "average")
    report = weld(based=based)
    merged = family.root / "merged"
    for name, tensor in weights(expected).items():
        # Without a base the names are the first expert's.
        found = weights(merged)[name if based else f"bert.{name}"]
        torch.testing.assert_close(found, tensor, rtol=1e-6, atol=1e-7)
    for task in family.tasks:
        head, wanted = (load_file(folder / "heads" / task / "head.safetensors") for folder in (merged, expected))
        assert head.keys() == wanted.keys()
        assert all(torch.equal(head[name], wanted[name]) for name in head)
        one, other = modelweld.load(merged, task=task), modelweld.load(expected, task=task)
        ids = torch.arange(5, 15)[None]
        torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    assert any("stay where they are" in note for note in report.notes)
    assert "align" in report.seconds


def test_the_alignment_is_a_file_of_the_merge_and_in_its_manifest(family: Family, weld: Weld) -> None:
    weld(align={"calibration": rows(family), "rows": 40})
    merged = family.root / "merged"
    document = json.loads((merged / "alignment.json").read_text())
    manifest = json.loads((merged / "manifest.json").read_text())
    places = load_file(merged / "alignment.safetensors")
    assert document["models"] == ["colour", "animal"]
    assert document["calibration"]["rows"] == 40
    assert 0 < document["identity_share"] < 0.5
    assert not document["aligned_already"]
    assert max(document["proof_error"].values()) < 1e-4
    assert max(document["preservation_error"].values()) < 1e-4
    assert places.keys() == {f"{label}/{group}" for label in document["models"] for group in document["groups"]}
    for group, told in document["groups"].items():
        assert places[f"animal/{group}"].shape[-1] == told["size"]
    assert {"alignment.json", "alignment.safetensors"} <= manifest["output"]["files"].keys()
    assert manifest["alignment"]["identity_share"] == document["identity_share"]
    assert len(manifest["alignment"]["digest"]) == 64
    assert str(family.root) not in (merged / "manifest.json").read_text()
    hf.AutoModel.from_pretrained(merged)


def test_equal_merges_have_equal_bytes(family: Family, weld: Weld) -> None:
    for name in ("one", "two"):
        weld(name, align={"calibration": rows(family), "rows": 32, "seed": 3})
    for file in ("model.safetensors", "manifest.json", "alignment.json", "alignment.safetensors"):
        assert (family.root / "one" / file).read_bytes() == (family.root / "two" / file).read_bytes(), file


def test_finetunes_of_one_base_are_said_to_be_aligned(plain: Family, tmp_path: Path) -> None:
    family, out = plain, tmp_path / "merged"
    recipe = tmp_path / "recipe.yaml"
    models = {task: {"path": str(family.expert(task))} for task in family.tasks}
    recipe.write_text(yaml.safe_dump({"method": "mudsc", "base": str(family.base), "models": models}))
    report = merge(recipe, out, "cpu", root=tmp_path, staging=tmp_path / "staging")
    document = json.loads((out / "alignment.json").read_text())
    assert document["aligned_already"]
    assert document["identity_share"] == 1.0
    assert any("aligned already" in note for note in report.notes)
    expected = weights(average(family, tmp_path / "average"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out).items())


def test_a_method_that_needs_the_base_gets_experts_in_the_bases_order(
    plain: Family, family: Family, weld: Weld, tmp_path: Path
) -> None:
    weld(method="task_arithmetic", align={}, models=_models(family))
    assert json.loads((family.root / "merged" / "alignment.json").read_text())["order_of"] == "base"
    recipe = tmp_path / "plain.yaml"
    recipe.write_text(yaml.safe_dump({"method": "task_arithmetic", "base": str(plain.base), "models": _models(plain)}))
    merge(recipe, tmp_path / "plain", "cpu", root=tmp_path, staging=tmp_path / "staging")
    for name, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(family.root / "merged")[name], tensor, rtol=1e-6, atol=1e-7)


def _models(family: Family) -> dict[str, Any]:
    return {task: {"path": str(family.expert(task))} for task in family.tasks}


def test_zipped_copies_keep_the_function(family: Family, weld: Weld) -> None:
    shutil.rmtree(family.expert("colour"))
    model = hf.BertForSequenceClassification.from_pretrained(family.expert("animal"))
    spec = derive_spec(model.config)
    before = model.eval()(torch.arange(5, 15)[None]).logits
    model.load_state_dict(spec.apply(model.state_dict(), spec.random(2)))
    model.save_pretrained(family.expert("colour"))
    shutil.copy(family.expert("animal") / "tokenizer.json", family.expert("colour"))
    weld(align={"mode": "zip", "inside": 1.0})
    for task in family.tasks:
        found = modelweld.load(family.root / "merged", task=task)(torch.arange(5, 15)[None]).logits
        torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-4)


def test_alpha_is_chosen_on_validation_rows_and_its_curve_reported(family: Family, weld: Weld) -> None:
    settings = {"alpha": "auto", "grid": [0.0, 0.5, 1.0], "calibration": rows(family), "rows": 32}
    weld(align={**settings, "validation": rows(family, "validation")})
    document = json.loads((family.root / "merged" / "alignment.json").read_text())
    assert list(document["alpha_curve"]) == ["0", "0.5", "1"]
    best = max(document["alpha_curve"].values())
    assert document["alpha_curve"][f"{document['alpha']:g}"] == best


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"space": "activations"}, ConfigError, "needs rows"),
        ({"alpha": "auto"}, ConfigError, "no calibration rows"),
        ({"calibration": "few"}, MergeError, "4 calibration rows are too few"),
        ({"calibration": "full", "alpha": "auto", "validation": None}, ConfigError, "needs labelled rows"),
    ],
)
def test_calibration_that_does_not_do_is_refused_and_nothing_written(
    family: Family, weld: Weld, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    if settings.get("calibration"):
        few = settings["calibration"] == "few"
        settings = settings | {"calibration": rows(family), "rows": 4 if few else 32}
    with pytest.raises(error, match=message):
        weld(align=settings)
    assert not (family.root / "merged").exists()


def test_zip_with_a_method_that_reads_the_base_is_refused(weld: Weld) -> None:
    with pytest.raises(MergeError, match=r"task_arithmetic .* reads the base"):
        weld(method="task_arithmetic", align={"mode": "zip"})


def test_a_hand_given_spec_is_proved_like_any_other(family: Family, weld: Weld) -> None:
    spec = derive_spec(hf.AutoConfig.from_pretrained(family.expert("colour")))
    file = family.root / "spec.json"
    file.write_text(spec.to_json())
    weld(align={"spec": str(file)})
    text = spec.to_json()
    document = json.loads(text)
    name = "bert.encoder.layer.0.output.dense.weight"
    document["axes"][name][1] = [{"size": 64, "group": None, "why": "by mistake"}]
    file.write_text(json.dumps(document))
    with pytest.raises(MergeError, match=r"colour.*intermediate"):
        weld("wrong", align={"spec": str(file)})
    file.write_text("[]")
    with pytest.raises(MergeError, match="not a symmetry spec"):
        weld("wrong", align={"spec": str(file)})
    assert not (family.root / "wrong").exists()


def test_activations_that_are_not_finite_are_refused(family: Family, weld: Weld) -> None:
    model = hf.BertForSequenceClassification.from_pretrained(family.expert("animal"))
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias[0] = float("inf")
    model.save_pretrained(family.expert("animal"))
    with pytest.raises(modelweld.errors.ModelweldError, match=r"not finite|infinite|nan"):
        weld(align={"calibration": rows(family), "rows": 32})
    assert not (family.root / "merged").exists()


@pytest.mark.parametrize("method", ["ties", "dare", "drm", "average"])
def test_alpha_is_scored_by_the_very_merge_that_is_written(family: Family, method: str, tmp_path: Path) -> None:
    from modelweld.alignment import align_inputs
    from modelweld.engine import build, merge_in_memory, open_inputs

    document = {"method": method, "base": str(family.base), "models": _models(family), "align": {}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    recipe = load_recipe(file)
    merge(recipe, tmp_path / "merged", "cpu", root=family.root, staging=tmp_path / "staging")
    with open_inputs(recipe) as inputs:
        plan = build(recipe, inputs)
        found = merge_in_memory(plan, align_inputs(recipe, plan, inputs, family.root).inputs)
    written = weights(tmp_path / "merged")
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())


def test_a_method_that_takes_long_is_stood_in_for_by_the_mean_and_the_record_says_so(
    family: Family, weld: Weld, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelweld.alignment import scoring

    settings = {"alpha": "auto", "grid": [0.5, 1.0], "calibration": rows(family), "rows": 32}
    settings["validation"] = rows(family, "validation")
    weld("quick", method="drm", align=settings, models=_models(family))
    assert _scored_by(family.root / "quick") == "drm"
    monkeypatch.setattr(scoring, "AFFORDABLE_FLOPS", 1e3)
    weld("slow", method="drm", align=settings, models=_models(family))
    assert _scored_by(family.root / "slow") == "linear"


def _scored_by(merged: Path) -> str:
    by = json.loads((merged / "alignment.json").read_text())["alpha_scored_by"]
    assert json.loads((merged / "manifest.json").read_text())["alignment"]["alpha_scored_by"] == by
    return str(by)
