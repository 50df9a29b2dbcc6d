"""Adapters as whole models: what is loaded, scored and exported is what PEFT computes on the same base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import modelweld
from modelweld.checkpoints import content_digest
from modelweld.checkpoints.folding import Folded, base_for
from modelweld.checkpoints.loading import config_of, export, load
from modelweld.errors import CheckpointError, ConfigError
from modelweld.evaluation.systems import System, model_digest, open_system
from modelweld.stages.merge import merge
from tests.support.families import family, recipe, weights_of
from tests.support.lora import IDS, QUERY, bert, edited, filled, llama, write_adapter, write_classifier

peft = pytest.importorskip("peft")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_a_loaded_adapter_computes_what_peft_computes(tmp_path: Path) -> None:
    root = bert(tmp_path)
    expected = write_classifier(root, "e0", 1, bias="all")
    model = load(root / "e0", base=root / "base")
    assert type(model) is t.BertForSequenceClassification
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert config_of(root / "e0", base=root / "base")["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    with pytest.raises(ConfigError, match="no model without its base"):
        load(root / "e0")


def test_half_precision_bases_do_not_round_the_delta_away(tmp_path: Path) -> None:
    root = llama(tmp_path, dtype="bfloat16")
    write_adapter(root / "base", root / "e0", 1)
    with (
        Folded.onto(root / "base", root / "e0") as exact,
        Folded.onto(root / "base", root / "e0", rounded=True) as rounded,
    ):
        assert exact.tensors[QUERY].dtype == torch.float32
        assert rounded.tensors[QUERY].dtype == torch.bfloat16
        assert torch.equal(exact.read(QUERY).bfloat16(), rounded.read(QUERY))
        assert not torch.equal(exact.read(QUERY), rounded.read(QUERY).float())
        untouched = "model.layers.0.self_attn.k_proj.weight"
        assert exact.tensors[untouched].dtype == torch.bfloat16
        # Read in pieces, as an export does, a weight is the same.
        whole = memoryview(bytearray(exact.tensors[QUERY].nbytes))
        for start in range(0, len(whole), 100):
            exact.read_into(QUERY, start, whole[start : start + 100])
        assert torch.equal(torch.frombuffer(whole, dtype=torch.float32).reshape(16, 16), exact.read(QUERY))


def test_the_base_with_a_head_lent_by_an_adapter_is_the_base_alone(tmp_path: Path) -> None:
    root = bert(tmp_path)
    write_classifier(root, "e0", 1, bias="all")
    lent = open_system(System("base", root / "base", head_from=root / "e0", base=root / "base"))
    own, saved = weights_of(root / "base"), load_file(root / "e0" / "adapter_model.safetensors")
    for name, tensor in lent.state_dict().items():
        if name.startswith("classifier"):
            assert torch.equal(tensor, saved[f"base_model.model.{name}"])
        else:
            assert torch.equal(tensor, own[name.removeprefix("bert.")]), name


def test_an_edited_scaling_is_another_model(tmp_path: Path) -> None:
    root = bert(tmp_path)
    write_classifier(root, "e0", 1)
    system = System("expert", root / "e0", base=root / "base")
    before, own = model_digest(system), content_digest(root / "e0")
    edited(lora_alpha=12)(root / "e0")
    assert content_digest(root / "e0") != own
    after = model_digest(system)
    assert after != before
    weights = weights_of(root / "base")
    weights["pooler.dense.bias"] += 1
    save_file(weights, root / "base" / "model.safetensors", metadata={"format": "pt"})
    assert model_digest(system) != after, "another base makes another model of the same adapter"


def test_an_exported_adapter_needs_neither_modelweld_nor_peft(tmp_path: Path) -> None:
    root = bert(tmp_path)
    expected = write_classifier(root, "e0", 1)
    (root / "base" / "vocab.txt").write_text("a\n")
    export(root / "e0", None, root / "plain", base=root / "base")
    model = t.AutoModelForSequenceClassification.from_pretrained(root / "plain").eval()
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert sorted(file.name for file in (root / "plain").iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    with pytest.raises(ConfigError, match="no model without its base"):
        export(root / "e0", None, root / "other")
    assert not (root / "other").exists()
    (root / "base" / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="link out of its directory"):
        export(root / "e0", None, root / "leaked", base=root / "base")


def test_a_merge_kept_as_an_adapter_keeps_its_heads(tmp_path: Path) -> None:
    root = bert(tmp_path)
    write_classifier(root, "e0", 1)
    write_classifier(root, "e1", 2, labels=4)
    merge(recipe(root, "drm", experts=2, drop_rate=0.5), root / "folded")
    merge(recipe(root, "drm", experts=2, drop_rate=0.5, output={"adapter": "keep"}), root / "kept")
    for task, count in (("e0", 3), ("e1", 4)):
        folded = logits(modelweld.load(root / "folded", task=task))
        assert folded.shape == (2, count)
        assert torch.allclose(logits(load(root / "kept", task, base=root / "base")), folded, atol=1e-5)
        export(root / "kept", task, root / task / "plain", base=root / "base")
        plain = t.AutoModelForSequenceClassification.from_pretrained(root / task / "plain").eval()
        assert torch.allclose(logits(plain), folded, atol=1e-5)
    model = t.BertForSequenceClassification.from_pretrained(root / "e0" / "plain")
    head = {name: tensor.clone() for name, tensor in model.classifier.state_dict().items()}
    with torch.no_grad():
        for name, tensor in weights_of(root / "base").items():
            model.get_parameter(f"bert.{name}").copy_(tensor)
    wrapped = peft.PeftModel.from_pretrained(model, root / "kept").eval()
    assert torch.allclose(logits(wrapped), logits(modelweld.load(root / "folded", task="e0")), atol=1e-5)
    assert all(torch.equal(head[name], tensor) for name, tensor in wrapped.model.classifier.state_dict().items())
    card = (root / "kept" / "README.md").read_text()
    assert 'modelweld.load("merged", task="e0", base="path/to/base")' in card
    assert "library_name: peft" in card
    assert "base=" not in (root / "folded" / "README.md").read_text()
    with pytest.raises(ConfigError, match="has heads for e0, e1"):
        export(root / "kept", None, root / "none", base=root / "base")


def test_a_base_with_its_own_head_keeps_it_under_an_adapter_without_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = t.BertConfig(**shape, intermediate_size=24, num_labels=3)
    t.BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    folded = write_adapter(
        tmp_path / "base", tmp_path / "e0", 1, cls=t.BertForSequenceClassification, target_modules=["query"]
    )
    model = load(tmp_path / "e0", base=tmp_path / "base")
    state = model.state_dict()
    assert state.keys() == folded.keys()
    assert all(torch.allclose(state[name], tensor, atol=1e-6) for name, tensor in folded.items())


def test_where_the_base_of_an_adapter_is_looked_for(tmp_path: Path) -> None:
    root = bert(tmp_path)
    write_classifier(root, "e0", 1)
    assert base_for(root / "base", None, tmp_path) is None
    assert base_for(root / "e0", None, tmp_path / "nowhere") == root / "base", "what PEFT wrote into its config"
    shutil.copytree(root / "base", tmp_path / "project" / "models" / "base")
    assert base_for(root / "e0", None, tmp_path / "project") == tmp_path / "project" / "models" / "base"
    assert base_for(root / "e0", root / "base", tmp_path / "project") == root / "base"
    edited(base_model_name_or_path="org/gone")(root / "e0")
    with pytest.raises(ConfigError, match=r"its base \(org/gone\) is not here"):
        base_for(root / "e0", None, tmp_path / "nowhere")


def test_a_head_of_no_known_architecture_asks_for_its_config(tmp_path: Path) -> None:
    root = bert(tmp_path)
    write_classifier(root, "e0", 1)
    edited(task_type=None)(root / "e0")
    with pytest.raises(CheckpointError, match=r"head \(base_model.model.classifier.bias\) could be of several"):
        load(root / "e0", base=root / "base")
    document = json.loads((root / "base" / "config.json").read_text())
    named = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    (root / "e0" / "config.json").write_text(json.dumps(document | named))
    assert load(root / "e0", base=root / "base").config.id2label == {0: "a", 1: "b", 2: "c"}
    with Folded.onto(root / "base", root / "e0") as model:
        assert "classifier.weight" in model.tensors


# What is adapted, and what is saved whole because the base has none of it.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"target_modules": "all-linear"},
    "bert-mlm": {"target_modules": ["query", "value"], "modules_to_save": ["pooler"]},
    "roberta": {"target_modules": ["query", "value"]},
    "distilbert": {"target_modules": ["q_lin", "v_lin"], "modules_to_save": ["pre_classifier"]},
    "deberta-v2": {"target_modules": ["query_proj", "value_proj"], "modules_to_save": ["pooler"]},
    "llama": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_adapters_of_every_family_are_loaded_merged_and_exported_with_their_heads(tmp_path: Path, kind: str) -> None:
    base, expert, _, _ = family(kind)
    base.save_pretrained(tmp_path / "base")
    document = json.loads((tmp_path / "base" / "config.json").read_text()) | {"pad_token_id": 0}
    (tmp_path / "base" / "config.json").write_text(json.dumps(document))
    model = type(expert).from_pretrained(tmp_path / "base", num_labels=3)
    plainly = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"r": 2, "lora_alpha": 4, "task_type": "SEQ_CLS"} | FAMILIES[kind]
    adapter = filled(peft.get_peft_model(model, peft.LoraConfig(**settings)), 1).eval()
    adapter.save_pretrained(tmp_path / "e0")
    with torch.no_grad():
        expected = adapter(input_ids=IDS).logits
    assert torch.allclose(logits(load(tmp_path / "e0", base=tmp_path / "base")), expected, atol=1e-4)
    lent = open_system(System("base", tmp_path / "base", head_from=tmp_path / "e0", base=tmp_path / "base"))
    saved = load_file(tmp_path / "e0" / "adapter_model.safetensors")
    for name, tensor in lent.state_dict().items():
        assert torch.equal(tensor, saved.get(f"base_model.model.{name}", plainly[name])), name
    merge(recipe(tmp_path, "task_arithmetic", experts=1), tmp_path / "out")
    assert torch.allclose(logits(modelweld.load(tmp_path / "out", task="e0")), expected, atol=1e-4)
    export(tmp_path / "e0", None, tmp_path / "plain", base=tmp_path / "base")
    plain = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert torch.allclose(logits(plain), expected, atol=1e-4)
