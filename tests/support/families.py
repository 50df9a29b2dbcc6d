"""Small families of checkpoints with seeded weights, and what is asked of the files that a merge writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from modelweld.config import Recipe
from modelweld.config.recipe import RECIPE_ADAPTER


def save(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


TINY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def family(kind: str) -> tuple[Any, Any, str, str | None]:
    """A base, an expert with a task head, the head's prefix, and a tensor the base has alone."""
    import transformers as t

    torch.manual_seed(0)
    if kind == "bert":
        config = t.BertConfig(**TINY)
        return t.BertModel(config), t.BertForSequenceClassification(config), "bert.", None
    if kind == "bert-mlm":
        config = t.BertConfig(**TINY)
        return t.BertForMaskedLM(config), t.BertForSequenceClassification(config), "bert.", None
    if kind == "roberta":
        config = t.RobertaConfig(**TINY)
        return t.RobertaModel(config), t.RobertaForSequenceClassification(config), "roberta.", "pooler.dense.weight"
    if kind == "distilbert":
        config = t.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        return t.DistilBertModel(config), t.DistilBertForSequenceClassification(config), "distilbert.", None
    if kind == "deberta-v2":
        config = t.DebertaV2Config(**TINY)
        return t.DebertaV2Model(config), t.DebertaV2ForSequenceClassification(config), "deberta.", None
    if kind == "vit":
        sizes = {k: v for k, v in TINY.items() if k != "vocab_size"}
        config = t.ViTConfig(**sizes, image_size=8, patch_size=4)
        return t.ViTModel(config), t.ViTForImageClassification(config), "vit.", "pooler.dense.weight"
    if kind == "t5":
        config = t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        return t.T5Model(config), t.T5ForSequenceClassification(config), "transformer.", None
    if kind == "llama":
        config = t.LlamaConfig(**TINY, num_key_value_heads=1)
        return t.LlamaModel(config), t.LlamaForSequenceClassification(config), "model.", None
    config = t.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return t.GPT2Model(config), t.GPT2ForSequenceClassification(config), "transformer.", None


LLAMA_SHAPES = {
    "model.embed_tokens.weight": (48, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 40),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.down_proj.weight": (16, 40),
    "model.norm.weight": (16,),
    "lm_head.weight": (48, 16),
}


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 48, "hidden_size": 16}


def write_family(
    root: Path, shapes: dict[str, tuple[int, ...]] = LLAMA_SHAPES, *, experts: int = 3, **how: Any
) -> Path:
    """A base and experts with seeded weights in `root`; returns `root`."""
    dtype: torch.dtype = how.get("dtype", torch.float32)
    generator = torch.Generator().manual_seed(how.get("seed", 7))
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save(root / "base", base, CONFIG | how.get("config", {}))
    (root / "base" / "tokenizer.json").write_text("{}")
    for number in range(experts):
        noise = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        expert = {name: (base[name].float() + noise[name]).to(dtype) for name in shapes}
        save(root / f"e{number}", expert, CONFIG | how.get("config", {}))
    return root


def recipe(root: Path, method: str, *, experts: int = 3, weights: list[float] | None = None, **rest: Any) -> Recipe:
    models = {f"e{i}": {"path": str(root / f"e{i}"), "weight": weights[i] if weights else 1.0} for i in range(experts)}
    base = rest.pop("base", str(root / "base"))
    return RECIPE_ADAPTER.validate_python({"method": method, "base": base, "models": models} | rest)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def deltas(root: Path, name: str, experts: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    base = weights_of(root / "base")[name].double()
    return base, torch.stack([weights_of(root / f"e{i}")[name].double() - base for i in range(experts)])


def tree_bytes(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


SHAPES = LLAMA_SHAPES | {"model.layers.2.mlp.down_proj.weight": (500, 600), "model.layers.3.self_attn.v.bias": (600,)}
