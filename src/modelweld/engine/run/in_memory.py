"""A plan merged in memory: the tensors that the engine would write, without a directory."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from modelweld.checkpoints.buffers import bytes_of
from modelweld.checkpoints.shards import Slot
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import Plan
from modelweld.engine.run.worker import Worker


def merge_in_memory(plan: Plan, inputs: Inputs) -> dict[str, Tensor]:
    """The plan's tensors by name, computed on the CPU: the same methods, rules, seeds and rounding as on disk."""
    worker = Worker(inputs, torch.device("cpu"), threading.Event(), lambda _: None)
    slots, merged = plan.layout.slots, {}
    for tensor in plan.tensors:
        out = _Memory(slots[tensor.name])
        worker.make(tensor, slots[tensor.name], out)
        merged[tensor.name] = out.tensor
    return merged


class _Memory:
    """The bytes of one tensor."""

    def __init__(self, slot: Slot) -> None:
        self._raw = torch.empty(slot.nbytes, dtype=torch.uint8)
        self.tensor = self._raw.view(slot.dtype).reshape(slot.shape)

    def write(self, slot: Slot, start: int, data: memoryview) -> None:
        """Put bytes at `start`."""
        bytes_of(self._raw)[start : start + len(data)] = data
