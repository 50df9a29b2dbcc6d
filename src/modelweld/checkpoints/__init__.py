"""Weights on disk: open, read a tensor, match names, write shards, take digests, load with a head.

`checkpoint` opens model directories; `header` checks safetensors headers as hostile input, and `foreign` names files of
other formats. `names` matches the tensor names of models that store one backbone under different prefixes, `shards`
lays safetensors files out before their tensors are known, `digests` identifies weights, `adapter` reads LoRA adapters
as low-rank deltas and `folding` as whole models, `loading` gives transformers models and plain directories back.

    with Checkpoint.open("models/base") as base:
        weight = base.read("encoder.layer.0.output.dense.weight")
"""

from modelweld.checkpoints.checkpoint import Checkpoint
from modelweld.checkpoints.digests import content_digest, file_sha256, tensor_digest
from modelweld.checkpoints.header import TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "content_digest", "file_sha256", "tensor_digest"]
