"""LoRA experts in a plan: which tensors are merged in their factors, and the output tensors of an adapter kept as one.

A weight that adapters change is merged in its factors where the method can and no whole tensor takes part; otherwise
its delta is made dense, one weight at a time. What no adapter changes is the base's, unread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch

from modelweld.checkpoints.adapter import WRAPPING
from modelweld.config import Recipe
from modelweld.config.methods import MethodParameters
from modelweld.engine.plan.inputs import Expert, Inputs
from modelweld.engine.plan.records import Route, TensorPlan
from modelweld.errors import ConfigError
from modelweld.methods.registry import method


def route_of(name: str, parameters: MethodParameters, inputs: Inputs) -> Route | None:
    """How a merged tensor is computed; None when no expert changes it, so that the base's own is the result."""
    kinds = [_kind(expert, name) for expert in inputs.experts]
    chosen = method(parameters.method)
    keeps_base = chosen.keeps_equal_models(parameters)
    if keeps_base and all(kind == "untouched" for kind in kinds):
        return None
    if "factors" not in kinds:
        return "dense"
    return "factors" if chosen.low_rank and keeps_base and "whole" not in kinds else "densified"


def ranks_of(name: str, inputs: Inputs) -> tuple[int, ...]:
    """The rank of every expert's factors of a weight, in their order; 0 without any."""
    pairs = [expert.adapter.pairs.get(name) if expert.adapter else None for expert in inputs.experts]
    return tuple(pair.rank if pair else 0 for pair in pairs)


def bytes_read(name: str, expert: Expert) -> int:
    """What an expert's part in an adapted tensor takes to read."""
    tensors = expert.checkpoint.tensors
    if expert.adapter is None or name not in expert.adapter.touched:
        return 0 if expert.adapter else tensors[expert.name_map.names[name]].nbytes
    pair = expert.adapter.pairs.get(name)
    return tensors[pair.A].nbytes + tensors[pair.B].nbytes if pair else tensors[expert.name_map.names[name]].nbytes


def kept_as_adapter(
    recipe: Recipe, tensors: Sequence[TensorPlan], inputs: Inputs
) -> tuple[list[TensorPlan], dict[str, int]]:
    """The two factors of every merged weight as output tensors, and the ranks by module for the adapter's config.

    Raises ConfigError naming the tensor or expert that cannot stay low-rank.
    """
    for expert in inputs.experts:
        if expert.adapter is None:
            raise _cannot_keep(f"{expert.label} is a whole model")
    merged = [tensor for tensor in tensors if tensor.action == "merge"]
    for tensor in merged:
        if tensor.route != "factors":
            raise _cannot_keep(f"{tensor.name} is merged densely by {tensor.method}")
    first = inputs.experts[0].name_map
    dtype = torch.float32 if recipe.output.dtype == "auto" else getattr(torch, recipe.output.dtype)
    kept: list[TensorPlan] = []
    ranks: dict[str, int] = {}
    for tensor in merged:
        module = (first.prefix + tensor.name.removeprefix(first.reference_prefix)).removesuffix(".weight")
        pairs = [expert.adapter.pairs.get(tensor.name) for expert in inputs.experts if expert.adapter]
        present = [pair for pair in pairs if pair is not None]
        parts = len(tensor.packing.sizes) if tensor.packing else 1
        found = method(str(tensor.method)).output_rank([pair.rank if pair else 0 for pair in pairs])
        rank = ranks[module] = parts * found
        table, flipped = present[0].table, present[0].transposed
        rows, columns = tensor.shape
        out, inner = (columns, rows) if table or flipped else (rows, columns)
        sides: tuple[tuple[Literal["A", "B"], tuple[int, int]], ...] = (("A", (rank, inner)), ("B", (out, rank)))
        for side, shape in sides:
            name = WRAPPING + (f"{module}.lora_embedding_{side}" if table else f"{module}.lora_{side}.weight")
            kept.append(
                dataclasses.replace(
                    tensor, name=name, shape=shape, dtype=dtype, factor=side, whole=tensor, flipped=table or flipped
                )
            )
    return kept, ranks


def _kind(expert: Expert, name: str) -> Literal["whole", "factors", "untouched"]:
    if expert.adapter is None:
        return "whole"
    if name in expert.adapter.pairs:
        return "factors"
    return "whole" if name in expert.adapter.touched else "untouched"


def _cannot_keep(why: str) -> ConfigError:
    return ConfigError(
        f"the result is no adapter: {why}", where="output.adapter", hint="use `adapter: fold`, which writes a model"
    )
