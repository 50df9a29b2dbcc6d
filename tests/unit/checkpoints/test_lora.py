"""LoRA experts: what is merged from adapters equals what PEFT folds, and what stays an adapter loads with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import modelweld
from modelweld.checkpoints.loading import load
from modelweld.engine import build, open_inputs
from modelweld.errors import CheckpointError, ConfigError
from modelweld.lineage import manifest
from modelweld.methods import LowRank, drm
from modelweld.stages.merge import merge
from tests.support.families import recipe, tree_bytes, weights_of
from tests.support.lora import LORA, QUERY, edited, filled, llama, write_adapter

peft = pytest.importorskip("peft")


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"layers.0.*": 9}},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "save_embedding_layers": "auto"},
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_folded_adapter_is_what_peft_folds(tmp_path: Path, case: str) -> None:
    root = llama(tmp_path)
    lora = {key: value for key, value in CASES[case].items() if key != "save_embedding_layers"}
    folded = write_adapter(root / "base", root / "e0", 1, **lora)
    for method in ("average", "ties"):
        merge(recipe(root, method, experts=1, **({"density": 1.0} if method == "ties" else {})), root / method)
        merged = weights_of(root / method)
        assert merged.keys() == folded.keys()
        for name, tensor in folded.items():
            assert torch.allclose(merged[name], tensor, atol=1e-6), (method, name)
    assert manifest.verify(root / "average") == []


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_classifier_with_its_head_and_biases_is_what_peft_folds(tmp_path: Path, bias: str) -> None:
    config = t.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    torch.manual_seed(0)
    t.BertModel(config).save_pretrained(tmp_path / "base")
    lora = {"target_modules": ["query", "dense"], "bias": bias, "task_type": "SEQ_CLS"}
    model = t.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapter = filled(peft.get_peft_model(model, peft.LoraConfig(**(LORA | lora))), 1)
    adapter.save_pretrained(tmp_path / "e0")
    ids = torch.arange(12).reshape(2, 6)
    expected = adapter.eval()(input_ids=ids).logits
    merge(recipe(tmp_path, "task_arithmetic", experts=1), tmp_path / "out")
    loaded = modelweld.load(tmp_path / "out", task="e0")
    assert type(loaded) is t.BertForSequenceClassification
    assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)


def test_conv1d_adapters_merge_by_meaning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = t.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    t.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    lora = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "cls": t.GPT2LMHeadModel}
    states = [write_adapter(tmp_path / "base", tmp_path / f"e{i}", i + 1, **lora) for i in range(2)]
    base = weights_of(tmp_path / "base")
    name = "transformer.h.0.attn.c_attn.weight"
    stack = torch.stack([state[name].double() - base[name].double() for state in states])
    merge(recipe(tmp_path, "average", experts=2), tmp_path / "average")
    merge(recipe(tmp_path, "drm", experts=2, drop_rate=0.5), tmp_path / "drm")
    merged = weights_of(tmp_path / "average")[name].double() - base[name]
    assert torch.allclose(merged, stack.mean(0), atol=1e-6)
    parts = [drm.merge(part.mT.contiguous(), drop_rate=0.5).mT for part in stack.split(16, dim=2)]
    merged = weights_of(tmp_path / "drm")[name].double() - base[name]
    assert torch.allclose(merged, torch.cat(parts, dim=1), atol=1e-5)
    merge(recipe(tmp_path, "drm", experts=2, drop_rate=0.5, output={"adapter": "keep"}), tmp_path / "kept")
    kept = peft.PeftModel.from_pretrained(t.GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "kept")
    again = kept.merge_and_unload().state_dict()[name]
    assert torch.allclose(again, weights_of(tmp_path / "drm")[name], atol=1e-5)


LOW_RANK = {"drm": {"drop_rate": 0.5}, "linear": {}, "task_arithmetic": {"scale": 0.4}, "knots": {}, "tsv_m": {}}
LOW_RANK["least_interference"] = {"side": "both"}


@pytest.mark.parametrize("method", sorted(LOW_RANK))
def test_a_kept_adapter_loads_with_peft_and_is_what_is_folded(tmp_path: Path, method: str) -> None:
    root = llama(tmp_path)
    write_adapter(root / "base", root / "e0", 1, rank_pattern={"q_proj": 4}, use_rslora=True)
    write_adapter(root / "base", root / "e1", 2, target_modules=["q_proj", "o_proj"])
    asked = {"experts": 2, "weights": [0.5, 1.5], **LOW_RANK[method]}
    merge(recipe(root, method, **asked), root / "folded")
    merge(recipe(root, method, output={"adapter": "keep"}, **asked), root / "kept")
    model = peft.PeftModel.from_pretrained(t.LlamaForCausalLM.from_pretrained(root / "base"), root / "kept")
    state, folded = model.merge_and_unload().state_dict(), weights_of(root / "folded")
    assert all(torch.allclose(state[name], tensor, atol=1e-5) for name, tensor in folded.items())
    assert not torch.allclose(folded[QUERY], weights_of(root / "base")[QUERY], atol=1e-4)
    assert manifest.verify(root / "kept") == []
    recorded = manifest.read(root / "folded").data()["tensors"]
    assert recorded[QUERY]["route"] == "factors"
    assert recorded["model.norm.weight"]["reason"] == "no adapter changes it"


def test_drm_of_factors_equals_drm_of_the_dense_deltas() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [
        LowRank(torch.randn(40, 4, generator=generator).double(), torch.randn(4, 30, generator=generator).double())
        for _ in range(3)
    ]
    nothing = LowRank(torch.zeros(40, 0, dtype=torch.float64), torch.zeros(0, 30, dtype=torch.float64))
    for direction in ("horizontal", "vertical"):
        merged = drm.merge_low_rank([*factors, nothing], direction=direction).dense()
        expected = drm.merge(torch.stack([f.dense() for f in factors]), direction=direction)
        assert float((merged - expected).norm() / expected.norm()) < 1e-9


@pytest.mark.parametrize("method", ["drm", "ties", "slerp", "model_stock", "linear"])
def test_adapters_and_whole_models_mix(tmp_path: Path, method: str) -> None:
    root = llama(tmp_path)
    folded = write_adapter(root / "base", root / "e0", 1)
    other = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in weights_of(root / "base").items()}
    for name, state in (("e1", other), ("whole", folded)):
        (root / name).mkdir()
        (root / name / "config.json").write_bytes((root / "base" / "config.json").read_bytes())
        save_file({k: v.contiguous() for k, v in state.items()}, root / name / "model.safetensors")
    merge(recipe(root, method, experts=2), root / "mixed")
    asked = recipe(root, method, experts=2)
    models = dict(asked.models or {})
    models["e0"] = models["e0"].model_copy(update={"path": str(root / "whole")})
    merge(asked.model_copy(update={"models": models}), root / "dense")
    mixed, dense = weights_of(root / "mixed"), weights_of(root / "dense")
    for name, tensor in dense.items():
        # The whole model is rounded to float32, so an entry at a threshold may fall on its other side.
        assert (mixed[name] - tensor).norm() <= 1e-3 * (tensor - weights_of(root / "base")[name]).norm() + 1e-5, name
    assert manifest.read(root / "mixed").data()["tensors"][QUERY]["route"] == "densified"
    with pytest.raises(ConfigError, match="the result is no adapter: e1 is a whole model"):
        merge(recipe(root, method, experts=2, output={"adapter": "keep"}), root / "kept")


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)

    return edit


def emptied(directory: Path) -> None:
    """What saving under DeepSpeed's ZeRO-3 leaves where the weights were not gathered first."""
    file = directory / "adapter_model.safetensors"
    save_file({name: torch.empty(0) for name in load_file(file)}, file)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (emptied, r"empty factors \[0\] and \[0\], as DeepSpeed's ZeRO-3"),
        (edited(use_dora=True), "e0 uses use_dora"),
        (edited(lora_bias=True), "e0 uses lora_bias"),
        (edited(target_parameters=["mlp.experts.gate_up_proj"]), "e0 uses target_parameters"),
        (edited(use_shiny=3), "e0 uses use_shiny"),
        (edited(peft_type="LOHA"), "e0 is a LOHA adapter"),
        (edited(init_lora_weights="pissa_niter_4"), "initialised by 'pissa_niter_4'"),
        (edited(r=3), "says rank 3 for model.layers"),
        (edited(alpha_pattern={"(": 1}), "is no regular expression"),
        (renamed("layers.1", "layers.9"), "adapts model.layers.9.mlp.down_proj, and the base has no weight"),
        (renamed("layers.0.mlp.down_proj.lora_A", "layers.0.mlp.up_proj.lora_A"), "one of the two factors"),
        (renamed("down_proj", "up_proj"), "the base's is"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "an adapter without adapter_model.safetensors"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    root = llama(tmp_path)
    write_adapter(root / "base", root / "e0", 1)
    spoil(root / "e0")
    with pytest.raises(CheckpointError, match=words) as caught:
        merge(recipe(root, "drm", experts=1), root / "out")
    assert caught.value.exit_code == 2
    assert not (root / "out").exists()


def test_adapters_ask_for_a_base_and_for_methods_that_stay_low_rank(tmp_path: Path) -> None:
    root = llama(tmp_path)
    write_adapter(root / "base", root / "e0", 1)
    with pytest.raises(ConfigError, match="e0 is an adapter, and there is no base"):
        merge(recipe(root, "average", experts=1, base=None), root / "out")
    for method, changes in (("ties", {}), ("linear", {"scale": 0.5}), ("linear", {"normalize": False})):
        with pytest.raises(ConfigError, match=f"merged densely by {method}"):
            merge(recipe(root, method, experts=1, output={"adapter": "keep"}, **changes), root / "out")
    values = load_file(root / "e0" / "adapter_model.safetensors")
    next(iter(values.values()))[0, 0] = float("nan")
    save_file(values, root / "e0" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="e0 holds NaN"):
        merge(recipe(root, "drm", experts=1), root / "out")


def test_an_edited_adapter_is_never_taken_for_the_old_one(tmp_path: Path) -> None:
    root = llama(tmp_path)
    write_adapter(root / "base", root / "e0", 1)
    asked = recipe(root, "drm", experts=1)
    with open_inputs(asked) as inputs:
        before = build(asked, inputs).key
    merge(asked, root / "first")
    edited(lora_alpha=12)(root / "e0")
    with open_inputs(asked) as inputs:
        assert build(asked, inputs).key != before
    merge(asked, root / "second")
    first, second, base = (weights_of(root / name)[QUERY] for name in ("first", "second", "base"))
    assert torch.allclose(second - base, 2 * (first - base), atol=1e-6)


def test_half_precision_bases_and_threads_leave_adapters_exact(tmp_path: Path) -> None:
    root = llama(tmp_path, dtype="bfloat16")
    for number in range(2):
        write_adapter(root / "base", root / f"e{number}", number + 1)
    merge(recipe(root, "drm", experts=2), root / "one", threads=1)
    merge(recipe(root, "drm", experts=2), root / "two", threads=2)
    assert tree_bytes(root / "one") == tree_bytes(root / "two")
    assert manifest.read(root / "one").data()["notes"] == []


@pytest.mark.parametrize(("method", "warned"), [("drm", True), ("ties", False)])
def test_an_adapter_that_was_folded_into_half_precision_is_told_by_name(
    tmp_path: Path, method: str, warned: bool
) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    root = llama(tmp_path, dtype="bfloat16", **wide)
    for number in range(2):
        write_adapter(root / "base", root / f"a{number}", number + 1, r=8)
        (root / f"e{number}").mkdir()
        folded = load(root / f"a{number}", base=root / "base").bfloat16()
        folded.save_pretrained(root / f"e{number}")
    merge(recipe(root, method, experts=2), root / "out")
    notes = manifest.read(root / "out").data()["notes"]
    told = [f"e{number} looks like an adapter of rank 8 or so" for number in range(2)]
    assert [note[: len(told[0])] for note in notes] == (told if warned else [])


def test_adapters_of_one_base_are_aligned_already(tmp_path: Path) -> None:
    root = llama(tmp_path)
    write_adapter(root / "base", root / "e0", 1)
    write_adapter(root / "base", root / "e1", 2)
    merge(recipe(root, "mudsc", experts=2), root / "aligned")
    merge(recipe(root, "average", experts=2), root / "plain")
    aligned, plain = weights_of(root / "aligned"), weights_of(root / "plain")
    assert all(torch.allclose(aligned[name], tensor, atol=1e-6) for name, tensor in plain.items())
    assert any("aligned already" in note for note in manifest.read(root / "aligned").data()["notes"])
