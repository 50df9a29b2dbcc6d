"""LoRA experts in aligned merges: folded beside whole models, left alone among themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

import modelweld
from modelweld.stages.merge import MergeReport, merge
from modelweld.symmetry import derive_spec
from tests.conftest import Family, build_family

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base, an adapter of it for either task, and a whole model whose units are in another order."""
    found = build_family(tmp_path_factory.mktemp("adapters"))
    for seed, task in enumerate(found.tasks):
        labels = len(found.tasks[task])
        model = hf.BertForSequenceClassification.from_pretrained(found.base, num_labels=labels)
        lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS")
        adapter = peft.get_peft_model(model, lora)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if parameter.requires_grad and "original_module" not in name:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        adapter.save_pretrained(found.root / "adapters" / task)
        adapter.merge_and_unload().save_pretrained(found.root / "folded" / task)
    moved = hf.BertForSequenceClassification.from_pretrained(found.expert("animal"))
    spec = derive_spec(moved.config)
    moved.load_state_dict(spec.apply(moved.state_dict(), spec.random(1)))
    moved.save_pretrained(found.root / "moved" / "animal")
    shutil.copy(found.base / "tokenizer.json", found.root / "moved" / "animal")
    return found


def weld(family: Family, out: Path, models: dict[str, str], **recipe: Any) -> MergeReport:
    document = {
        "method": "mudsc", "base": str(family.base),
        "models": {task: {"path": str(family.root / path)} for task, path in models.items()}, **recipe,
    }  # fmt: skip
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return merge(file, out, "cpu", root=family.root, staging=out.parent / "staging")


def test_an_adapter_beside_a_whole_model_is_folded_and_aligned(family: Family, tmp_path: Path) -> None:
    calibration = {task: {"dataset": str(family.dataset(task)), "split": "train"} for task in family.tasks}
    weld(
        family, tmp_path / "merged", {"colour": "adapters/colour", "animal": "moved/animal"},
        align={"calibration": calibration, "rows": 32},
    )  # fmt: skip
    document = json.loads((tmp_path / "merged" / "alignment.json").read_text())
    assert document["folded"] == ["colour"]
    assert document["identity_share"] < 0.5
    weld(family, tmp_path / "plain", {"colour": "folded/colour", "animal": "models/animal"}, method="average")
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "plain"))
    for name, tensor in plain.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
    ids = torch.arange(5, 15)[None]
    for task in family.tasks:
        one, other = (modelweld.load(tmp_path / name, task=task)(ids).logits for name in ("merged", "plain"))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_adapter_and_a_moved_model_come_to_the_bases_order(family: Family, tmp_path: Path) -> None:
    models = {"colour": "adapters/colour", "animal": "moved/animal"}
    weld(family, tmp_path / "merged", models, method="task_arithmetic", align={})
    assert json.loads((tmp_path / "merged" / "alignment.json").read_text())["order_of"] == "base"
    weld(family, tmp_path / "plain", {"colour": "adapters/colour", "animal": "models/animal"}, method="task_arithmetic")
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "plain"))
    for name, tensor in plain.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["align", "zip"])
def test_adapters_of_one_base_are_said_to_be_aligned_and_stay_low_rank(
    family: Family, tmp_path: Path, mode: str
) -> None:
    models = {task: f"adapters/{task}" for task in family.tasks}
    report = weld(family, tmp_path / "merged", models, method="average", align={"mode": mode})
    assert any("adapters of one base" in note for note in report.notes)
    document = json.loads((tmp_path / "merged" / "alignment.json").read_text())
    assert (document["aligned_already"], document["identity_share"], document["folded"]) == (True, 1.0, [])
    weld(family, tmp_path / "plain", models, method="average")
    file = "model.safetensors"
    assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    assert {entry.get("route") for entry in manifest["tensors"].values()} == {None, "factors"}


def test_processes_of_their_own_give_the_same_bytes(family: Family, tmp_path: Path) -> None:
    """Views of folded adapters go to other processes, which open the files anew."""
    recipe = {
        "method": "mudsc", "base": str(family.base), "align": {},
        "models": {
            "colour": {"path": str(family.root / "adapters" / "colour")},
            "animal": {"path": str(family.root / "moved" / "animal")},
        },
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    for name, device in (("one", "cpu"), ("two", "cpu,cpu")):
        merge(file, tmp_path / name, device, root=family.root, staging=tmp_path / "staging")
    for written in ("model.safetensors", "heads/colour/head.safetensors", "alignment.json"):
        assert (tmp_path / "one" / written).read_bytes() == (tmp_path / "two" / written).read_bytes(), written
