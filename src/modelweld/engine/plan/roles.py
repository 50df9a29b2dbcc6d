"""What a tensor is in its model: by dtype, name and shape, and by what lies beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from modelweld.checkpoints import TensorInfo
from modelweld.checkpoints.header import DTYPES
from modelweld.checkpoints.names import is_buffer
from modelweld.engine.plan.records import Packing, Role

MERGEABLE = frozenset(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))

_EMBEDDING = re.compile(
    r"(embed|embeds|embeddings?|embed_\w+|\w+_embeddings?|\w+_embedding_table|wte|wpe|shared|relative_attention_bias"
    r"|lm_head|embed_out|word_embed\w*|cls\.predictions\.decoder)(\.weight)?$"
)
_NORM = re.compile(r"(norm|ln|layernorm|batchnorm|bn)[\w.]*\.(weight|bias|gamma|beta)$", re.IGNORECASE)
_QKV = re.compile(r"(^|\.)(c_attn|qkv|qkv_proj|Wqkv|wqkv|query_key_value|in_proj)\.weight$|(^|[._])in_proj_weight$")
_HALVES = re.compile(r"(^|\.)(gate_up_proj|Wi)\.weight$")
# Families that interleave queries, keys and values head by head instead of stacking them.
_INTERLEAVED = frozenset({"gpt_neox", "bloom", "gpt_neox_japanese"})


def role_of(info: TensorInfo) -> Role:
    """The role of one tensor."""
    if info.dtype not in MERGEABLE:
        return "integer"
    if is_buffer(info.name):
        return "buffer"
    if len(info.shape) >= 2 and _EMBEDDING.search(info.name):
        return "embedding"
    if _NORM.search(info.name) and len(info.shape) <= 1:
        return "norm"
    if len(info.shape) == 1:
        return "bias" if info.name.endswith("bias") else "norm" if info.name.endswith("weight") else "other"
    if len(info.shape) == 2:
        return "linear"
    return "convolution" if len(info.shape) in (3, 4, 5) and info.name.endswith("weight") else "other"


def packing_of(name: str, rows: int, config: Mapping[str, Any]) -> Packing | None:
    """The projections packed into a weight with `rows` outputs; None when it is one projection, or not known."""
    if _HALVES.search(name) and rows % 2 == 0:
        return Packing(1, (rows // 2, rows // 2))
    if not _QKV.search(name):
        return None
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    kind = str(config.get("model_type", ""))
    if heads and hidden and hidden % heads == 0:
        width = _first(config, "head_dim") or hidden // heads
        groups = _first(config, "num_key_value_heads", "num_kv_heads") or heads
        if kind == "gpt_bigcode" and not config.get("multi_query", True):
            return Packing(heads, (width,) * 3) if rows == 3 * heads * width else None
        if kind in _INTERLEAVED:
            return Packing(heads, (width,) * 3) if rows == 3 * heads * width else None
        if kind == "falcon" and config.get("new_decoder_architecture"):
            share = heads // groups * width
            return Packing(groups, (share, width, width)) if rows == groups * (share + 2 * width) else None
        if kind == "falcon" and not config.get("multi_query", True):
            return Packing(heads, (width,) * 3) if rows == 3 * heads * width else None
        if kind in ("falcon", "gpt_bigcode"):
            groups = 1
        if rows == (heads + 2 * groups) * width:
            return Packing(1, (heads * width, groups * width, groups * width))
    if rows % 3 == 0 and "in_proj" not in name.rsplit(".", 2)[-2:]:
        return Packing(1, (rows // 3,) * 3)
    return None


def layer_of(name: str) -> int | None:
    """The layer's index: the first number among the parts of a name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0), None)
