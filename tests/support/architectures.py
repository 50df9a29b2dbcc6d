"""Small instances of the architectures that symmetry is derived for, with weights that hide nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
GQA = TEXT | {"num_attention_heads": 8, "num_key_value_heads": 2}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SEQ2SEQ = {"vocab_size": 60, "d_model": 32, "decoder_start_token_id": 0} | SPECIAL
BART = SEQ2SEQ | {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
}
T5 = SEQ2SEQ | {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
DEBERTA = TEXT | {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "pooler_hidden_size": 32,
}

# class, config, options, units that must be free: sizes of groups that have to be found
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], set[int]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, {4, 8, 32, 48}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, {4, 8, 32, 48}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
        {4, 8, 32, 48},
    ),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", DEBERTA, {4, 8, 32, 48}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", TEXT | {"embedding_size": 16}, {4, 8, 16, 32, 48}),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, {4, 8, 32, 48}),
    "clip-vision": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        IMAGE | {"projection_dim": 20},
        {4, 8, 32, 48},
    ),
    "clip-text": (
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        TEXT | SPECIAL | {"projection_dim": 20},
        {4, 8, 32, 48},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40} | SPECIAL,
        {4, 8, 32, 128},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, {4, 8, 32, 48}),
    "t5-gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {4, 8, 32, 48},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, {4, 8, 32, 48}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA, {2, 4, 32, 48}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", GQA | {"tie_word_embeddings": True}, {2, 4, 32, 48}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GQA, {2, 4, 32, 48}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GQA | {"head_dim": 8}, {2, 4, 32, 48}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GQA | {"head_dim": 8}, {2, 4, 32, 48}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        GQA | {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40},
        {2, 4, 6, 32, 40},
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        TEXT | SPECIAL | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 4},
        {4, 8, 32, 48},
    ),
}


def build(name: str) -> tuple[nn.Module, Any]:
    model_class, config_class, options, _ = ARCHITECTURES[name]
    config = getattr(hf, config_class)(**options, architectures=[model_class])
    torch.manual_seed(0)
    model = getattr(hf, model_class)(config).eval()
    with torch.no_grad():
        # Norm gains of one and zero biases would hide a wrong group.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, config


class Block(nn.Module):
    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def resnet(norm: Callable[[int], nn.Module], width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), norm(width), nn.ReLU(), Block(width, norm))
    model.extend([Block(width, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)])
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor) if "var" in name else 0.1 * torch.randn_like(tensor))
    return model.eval()
