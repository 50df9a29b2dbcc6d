"""Checkpoints for the tensor inventory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def write_model(folder: Path, tensors: Tensors, architecture: str = "BertModel") -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": [architecture]}))
    return folder
