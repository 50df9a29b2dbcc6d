"""What a plan is made of: one record per output tensor and per head, and the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from modelweld.checkpoints.shards import Layout
from modelweld.config.methods import MethodParameters
from modelweld.methods.registry import method

Role = Literal["linear", "embedding", "norm", "bias", "convolution", "other", "buffer", "integer"]

# How a merged tensor is computed: from whole tensors, from low-rank deltas made dense, or in their factors.
Route = Literal["dense", "densified", "factors"]


@dataclass(frozen=True)
class Packing:
    """How several projections share one weight: its output rows are `groups` blocks of consecutive `sizes` rows."""

    groups: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor. `stored` are the experts' own names for it, in their order; empty for a copy.

    Of a merged adapter that stays one, an output tensor is a `factor` of the merged delta of the tensor `whole`,
    stored transposed relative to the weight when `flipped`. `ranks` are those of the experts' factors, in their
    order, 0 for one that has left the weight alone or holds it whole.
    """

    name: str
    action: Literal["merge", "copy"]
    role: Role
    parameters: MethodParameters | None
    reason: str
    shape: tuple[int, ...]
    source_dtype: torch.dtype
    dtype: torch.dtype
    stored: tuple[str, ...]
    read_bytes: int
    work_dtype: torch.dtype
    transposed: bool = False
    packing: Packing | None = None
    route: Route = "dense"
    ranks: tuple[int, ...] = ()
    factor: Literal["A", "B"] | None = None
    whole: TensorPlan | None = None
    flipped: bool = False

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def write_bytes(self) -> int:
        """The tensor's size on disk."""
        return self.elements * self.dtype.itemsize

    @property
    def method(self) -> str | None:
        """The method's name; None for a copy."""
        return self.parameters.method if self.parameters else None

    @property
    def streamed(self) -> bool:
        """Whether the tensor is worked on in cache-sized chunks rather than as a whole."""
        if self.parameters is None:
            return True
        return self.route == "dense" and method(self.parameters.method).streamed

    def streamed_on(self, device: str) -> bool:
        """As `streamed`, on a device of this kind: accelerators look at whole tensors without a wait for the host."""
        two_pass = self.parameters is not None and method(self.parameters.method).statistics is not None
        return self.streamed and (device == "cpu" or not two_pass)

    def data(self) -> dict[str, Any]:
        """This entry for machines: `plan --json`, the manifest."""
        document: dict[str, Any] = {
            "name": self.name,
            "action": self.action,
            "role": self.role,
            "method": self.method,
            "reason": self.reason,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "source_dtype": dtype_name(self.source_dtype),
            "parameters": self.parameters.model_dump(mode="json", exclude={"method"}) if self.parameters else None,
        }
        if self.transposed:
            document["stored_transposed"] = True
        if self.route != "dense":
            document["route"] = self.route
        if self.whole is not None:
            document["factor_of"] = {"tensor": self.whole.name, "shape": list(self.whole.shape), "factor": self.factor}
        if self.packing:
            document["packed"] = {"groups": self.packing.groups, "sizes": list(self.packing.sizes)}
        return document


@dataclass(frozen=True)
class HeadPlan:
    """One task's head, kept as its expert stores it."""

    task: str
    model: str
    tensors: tuple[str, ...]
    prefix: str
    reference_prefix: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The whole merge: tensors in writing order, heads, side files, what is left out and why, and the layout.

    `config_dtype` is what every config.json says the weights' dtype is: an expert's own may say something else, and
    transformers would cast the weights to it. None leaves the configs as they are. `adapter_ranks` by module are there
    when the output is an adapter.
    """

    tensors: tuple[TensorPlan, ...]
    heads: tuple[HeadPlan, ...]
    files: tuple[str, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    layout: Layout
    key: str
    config_dtype: str | None
    adapter_ranks: Mapping[str, int] | None = None

    @property
    def read_bytes(self) -> int:
        """Weights read from all models."""
        return sum(tensor.read_bytes for tensor in self.tensors) + sum(head.bytes for head in self.heads)

    @property
    def write_bytes(self) -> int:
        """Weights written."""
        return self.layout.size_bytes + sum(head.bytes for head in self.heads)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as a recipe writes it."""
    return str(dtype).removeprefix("torch.")
