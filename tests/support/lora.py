"""Tiny Llama and BERT models with LoRA adapters that PEFT wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as t

LLAMA = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "tie_word_embeddings": False,
}  # fmt: skip


LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


QUERY = "model.layers.0.self_attn.q_proj.weight"


def filled(model: Any, seed: int) -> Any:
    """The adapter with random B factors (PEFT starts them at zero) and changed saved modules."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def write_adapter(base: Path, out: Path, seed: int, cls: Any = t.LlamaForCausalLM, **lora: Any) -> dict[str, Any]:
    """Save an adapter of the base in `out`; returns the state of the model that PEFT folds it into."""
    model = cls.from_pretrained(base)
    adapter = filled(peft.get_peft_model(model, peft.LoraConfig(**(LORA | lora))), seed)
    adapter.save_pretrained(out)
    folded: dict[str, Any] = adapter.merge_and_unload().state_dict()
    return folded


def llama(root: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**(LLAMA | config)))
    model.to(getattr(torch, config.get("dtype", "float32"))).save_pretrained(root / "base")
    return root


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


IDS = torch.arange(12).reshape(2, 6)


def write_classifier(root: Path, name: str, seed: int, labels: int = 3, **lora: Any) -> torch.Tensor:
    """Save a classifier's adapter of a BERT base in `root`/base; returns PEFT's own logits."""
    model = t.BertForSequenceClassification.from_pretrained(root / "base", num_labels=labels)
    settings = LORA | {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"} | lora
    adapter = filled(peft.get_peft_model(model, peft.LoraConfig(**settings)), seed).eval()
    adapter.save_pretrained(root / name)
    with torch.no_grad():
        logits: torch.Tensor = adapter(input_ids=IDS).logits
    return logits


def bert(root: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    t.BertModel(t.BertConfig(**shape, intermediate_size=24, **config)).save_pretrained(root / "base")
    return root
