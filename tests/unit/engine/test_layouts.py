"""Families with layouts of their own: packed and interleaved projections, ties, convolutions, other vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import save_file

import modelweld
from modelweld.errors import CheckpointError
from modelweld.lineage import manifest
from modelweld.methods import drm
from modelweld.stages.merge import merge
from tests.support.families import deltas, recipe, save, weights_of

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
GROUPED = TEXT | {"num_key_value_heads": 2}
SEQ2SEQ = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}

MODELS: dict[str, Callable[[], Any]] = {
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**GROUPED, head_dim=8)),
    "gemma3": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**GROUPED, head_dim=8, layer_types=["full_attention"] * 2)
    ),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True)),
    "qwen2-moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**GROUPED, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8,
                         shared_expert_intermediate_size=12)
    ),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**GROUPED, pad_token_id=0, eos_token_id=1, bos_token_id=2)),
    "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=4)),
    "falcon": lambda: t.FalconForCausalLM(
        t.FalconConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    ),
    "falcon-new": lambda: t.FalconForCausalLM(
        t.FalconConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
                       new_decoder_architecture=True)
    ),
    "gpt-bigcode": lambda: t.GPTBigCodeForCausalLM(
        t.GPTBigCodeConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    ),
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**SEQ2SEQ, decoder_start_token_id=0)),
    "flan-t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(**SEQ2SEQ, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "resnet": lambda: t.ResNetForImageClassification(
        t.ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
    "convnext": lambda: t.ConvNextForImageClassification(
        t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    ),
}  # fmt: skip


def write_family(root: Path, kind: str, experts: int = 2) -> Any:
    """Save a base and experts that differ from it everywhere; returns the base."""
    torch.manual_seed(0)
    base = MODELS[kind]()
    base.save_pretrained(root / "base")
    for number in range(experts):
        expert = MODELS[kind]()
        expert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        expert.save_pretrained(root / f"e{number}")
    return base


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_mean_of_every_family_is_the_mean_of_its_models(tmp_path: Path, kind: str) -> None:
    base = write_family(tmp_path, kind)
    merge(recipe(tmp_path, "average", experts=2), tmp_path / "out")
    task = "e0" if (tmp_path / "out" / "heads").is_dir() else None
    merged = modelweld.load(tmp_path / "out", task=task)
    assert type(merged) is type(base)
    experts = [type(base).from_pretrained(tmp_path / f"e{number}") for number in range(2)]
    trained = dict(base.named_parameters())
    for name, parameter in merged.named_parameters():
        head = task is not None and not name.startswith(base.base_model_prefix)
        values = [dict(expert.named_parameters())[name] for expert in experts]
        expected = values[0] if head else torch.stack(values).double().mean(0)
        assert torch.allclose(parameter.double(), expected.double(), atol=1e-6), name
        assert name in trained


def rows(*sizes: int) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """Projections that are stacked, as models split them: `qkv.split(sizes)`."""
    return lambda weight: list(weight.split(list(sizes), dim=-2))


def by_head(heads: int) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """Projections interleaved head by head, as models view them: `qkv.view(heads, 3, width)`."""

    def unpack(weight: torch.Tensor) -> list[torch.Tensor]:
        viewed = weight.unflatten(-2, (heads, 3, -1))  # (…, heads, 3, width, in)
        return [viewed[..., part, :, :].flatten(-3, -2) for part in range(3)]

    return unpack


def grouped(groups: int, queries: int) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """Falcon's groups of some queries, a key and a value: `qkv.view(groups, queries + 2, width)`."""

    def unpack(weight: torch.Tensor) -> list[torch.Tensor]:
        viewed = weight.unflatten(-2, (groups, queries + 2, -1))
        ranges = (slice(0, queries), slice(queries, queries + 1), slice(queries + 1, queries + 2))
        return [viewed[..., part, :, :].flatten(-4, -2) for part in ranges]

    return unpack


PACKED: dict[str, tuple[str, str, Callable[[torch.Tensor], list[torch.Tensor]]]] = {
    "phi3 qkv": ("phi3", "model.layers.1.self_attn.qkv_proj.weight", rows(16, 8, 8)),
    "phi3 gate and up": ("phi3", "model.layers.0.mlp.gate_up_proj.weight", rows(24, 24)),
    "gpt-neox": ("gpt-neox", "gpt_neox.layers.0.attention.query_key_value.weight", by_head(4)),
    "bloom": ("bloom", "transformer.h.0.self_attention.query_key_value.weight", by_head(4)),
    "falcon": ("falcon", "transformer.h.0.self_attention.query_key_value.weight", rows(16, 4, 4)),
    "falcon-new": ("falcon-new", "transformer.h.1.self_attention.query_key_value.weight", grouped(2, 2)),
    "gpt-bigcode": ("gpt-bigcode", "transformer.h.0.attn.c_attn.weight", rows(16, 4, 4)),
}


@pytest.mark.parametrize("case", sorted(PACKED))
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_packed_projections_are_merged_as_the_model_unpacks_them(tmp_path: Path, case: str, direction: str) -> None:
    kind, name, unpack = PACKED[case]
    write_family(tmp_path, kind)
    merge(recipe(tmp_path, "drm", experts=2, drop_rate=0.5, direction=direction), tmp_path / "out")
    base, stack = deltas(tmp_path, name, experts=2)
    merged = unpack(weights_of(tmp_path / "out")[name].double() - base)
    for found, part in zip(merged, unpack(stack), strict=True):
        assert torch.allclose(found, drm.merge(part, drop_rate=0.5, direction=direction), atol=1e-6)


def test_torchs_own_packed_attention_is_merged_part_by_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"attn.in_proj_weight": (48, 16), "attn.in_proj_bias": (48,), "attn.out_proj.weight": (16, 16)}
    for model in ("base", "e0", "e1"):
        save(tmp_path / model, {name: torch.randn(shape) for name, shape in shapes.items()}, {"hidden_size": 16})
    merge(recipe(tmp_path, "drm", experts=2, drop_rate=0.5), tmp_path / "out")
    base, stack = deltas(tmp_path, "attn.in_proj_weight", experts=2)
    expected = torch.cat([drm.merge(part, drop_rate=0.5) for part in stack.split(16, dim=1)])
    assert torch.allclose(weights_of(tmp_path / "out")["attn.in_proj_weight"].double() - base, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma", "qwen3", "t5", "bloom"])
def test_ties_of_real_families_hold_after_a_merge(tmp_path: Path, kind: str) -> None:
    write_family(tmp_path, kind)
    merge(recipe(tmp_path, "ties", experts=2, density=0.5), tmp_path / "out")
    merged = modelweld.load(tmp_path / "out")
    inputs, outputs = merged.get_input_embeddings(), merged.get_output_embeddings()
    assert inputs.weight.data_ptr() == outputs.weight.data_ptr()


@pytest.mark.parametrize("kind", ["t5", "resnet", "convnext", "qwen2-moe"])
def test_what_drm_does_not_take_is_named_with_what_takes_it(tmp_path: Path, kind: str) -> None:
    write_family(tmp_path, kind)
    merge(recipe(tmp_path, "drm", experts=2, drop_rate=0.5), tmp_path / "out")
    tensors = manifest.read(tmp_path / "out").data()["tensors"]
    roles = {(entry["role"], entry["method"]) for entry in tensors.values()}
    assert all((method == "drm") == (role == "linear") for role, method in roles if method)
    assert {"t5": ("embedding", "ties"), "resnet": ("convolution", "ties"), "convnext": ("convolution", "ties")}.get(
        kind, ("norm", "ties")
    ) in roles
    if kind == "resnet":
        statistics = {name: entry for name, entry in tensors.items() if "running_" in name}
        assert statistics
        assert {entry["action"] for entry in statistics.values()} == {"copy"}
        counters = [entry for name, entry in tensors.items() if "num_batches_tracked" in name]
        assert all(entry["role"] in ("integer", "buffer") and entry["action"] == "copy" for entry in counters)


@pytest.mark.parametrize(("kind", "table"), [("gemma", "embed_tokens"), ("qwen2", "lm_head"), ("t5", "shared")])
def test_an_expert_with_a_resized_vocabulary_is_refused_with_both_sizes(tmp_path: Path, kind: str, table: str) -> None:
    write_family(tmp_path, kind)
    grown = type(MODELS[kind]()).from_pretrained(tmp_path / "e1")
    grown.resize_token_embeddings(43)
    grown.save_pretrained(tmp_path / "e1")
    with pytest.raises(CheckpointError, match=rf"e1 has a vocabulary of 43, the base one of 40 \(.*{table}") as caught:
        merge(recipe(tmp_path, "ties", experts=2), tmp_path / "out")
    assert "tokenizer" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_an_expert_that_unties_what_the_base_ties_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path, "gemma")
    stored = weights_of(tmp_path / "e1")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, tmp_path / "e1" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"e1 has tensor 'lm_head.weight', which is not present in the base"):
        merge(recipe(tmp_path, "ties", experts=2), tmp_path / "out")
