"""What lies beside the merged weights: the experts' heads, the configs and the reference's other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modelweld.checkpoints.adapter import WRAPPING, head_config, write_config
from modelweld.checkpoints.loading import HEAD_WEIGHTS, HEADS, PREFIX_KEY, REFERENCE_PREFIX_KEY
from modelweld.checkpoints.shards import write_tensors
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import HeadPlan, Plan
from modelweld.errors import MergeError


def write_beside(plan: Plan, inputs: Inputs, tree: Path) -> None:
    """Write heads and side files into the tree.

    Raises MergeError for a head with values that are not finite, and for one without the config that its labels are in.
    """
    for head in plan.heads:
        _write_head(head, inputs, tree, plan.config_dtype)
    if plan.adapter_ranks is not None and inputs.experts[0].adapter is not None:
        write_config(tree, plan.adapter_ranks, inputs.experts[0].adapter.config)
        return
    path = inputs.reference.path
    source = path if path.is_dir() else path.parent
    for name in plan.files:
        if name == "config.json":
            _write_config(inputs.reference.config, tree / name, plan.config_dtype)
        else:
            shutil.copyfile(source / name, tree / name)


def _write_head(head: HeadPlan, inputs: Inputs, tree: Path, dtype: str | None) -> None:
    expert = next(expert for expert in inputs.experts if expert.label == head.model)
    directory = tree / HEADS / head.task
    directory.mkdir(parents=True, exist_ok=True)
    wrapping = WRAPPING if expert.adapter else ""
    tensors = {name.removeprefix(wrapping): expert.checkpoint.read(name) for name in head.tensors}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise MergeError(
                f"{head.model} holds NaN or infinite values in its head ({name})",
                where=expert.checkpoint.place(wrapping + name),
                hint="fix or remove this model",
            )
    prefixes = {PREFIX_KEY: head.prefix, REFERENCE_PREFIX_KEY: head.reference_prefix}
    write_tensors(directory / HEAD_WEIGHTS, tensors, prefixes)
    config = head_config(expert.adapter, inputs.reference, tensors) if expert.adapter else expert.checkpoint.config
    if not config:
        where = str(expert.checkpoint.path)
        raise MergeError(f"{expert.label} has a head but no config.json", where=where, hint="add its config.json")
    _write_config(config, directory / "config.json", dtype)


def _write_config(config: Mapping[str, Any], target: Path, dtype: str | None) -> None:
    """The config as it was, but for the dtype of the weights that now lie beside it."""
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    document = {**config, key: dtype} if dtype is not None else dict(config)
    target.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
