"""Batch statistics of a merge, recomputed: in memory while alpha is chosen, and in the tree before it is published.

Channels of a mean vary less than any parent's did; statistics that are averages too undo a merge (REPAIR, arXiv
2211.08403).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor, nn

from modelweld.alignment.rows import Calibration, calibration_of, call_of
from modelweld.checkpoints.buffers import bytes_of
from modelweld.checkpoints.loading import load
from modelweld.checkpoints.shards import ShardFile
from modelweld.config import Recipe
from modelweld.config.align import Align
from modelweld.engine import Execution, Inputs, Plan
from modelweld.engine.plan.records import HeadPlan
from modelweld.errors import ConfigError, MergeError
from modelweld.formats.manifest import Repair
from modelweld.symmetry.families import STATISTICS
from modelweld.symmetry.instances import own_names
from modelweld.symmetry.repair import repair


def recomputes_statistics(settings: Align, plan: Plan) -> bool:
    """Whether batch statistics of this merge are recomputed: if there are some, and rows to run the merge on.

    Raises ConfigError where the recipe asks for it and names no rows.
    """
    has_statistics = any(tensor.name.endswith(STATISTICS) for tensor in plan.tensors)
    if settings.repair and not settings.calibration:
        raise ConfigError(
            "repair: true needs rows to run the merge on", where="align.calibration", hint="name a few hundred rows"
        )
    return has_statistics and settings.repair is not False and bool(settings.calibration)


def recompute_statistics(model: nn.Module, calibration: Calibration) -> int:
    """Recompute the model's batch statistics on the calibration rows; returns the number of layers."""
    return repair(model, [call_of(model, batch) for batch in calibration.batches])


def with_recomputed_statistics(
    recipe: Recipe, plan: Plan, inputs: Inputs, tree: Path, execution: Execution
) -> tuple[Execution, Repair | None]:
    """Recompute the batch statistics in `tree`; the execution with their digests and a record, or both unchanged.

    The bytes depend on the merge, the rows and the seed, and on no number of threads. Raises MergeError for a layer
    whose statistics the tree does not hold, and what reading rows raises.
    """
    settings = recipe.alignment
    if settings is None or not recomputes_statistics(settings, plan):
        return execution, None
    calibration = calibration_of(settings, inputs)
    # With a head it is the class that was trained; which head makes no difference to the layers before it.
    head = plan.heads[0] if plan.heads else None
    model = load(tree, head.task if head else None).float()
    with _one_thread():
        layers = recompute_statistics(model, calibration)
    finished, slots = dict(execution.finished), plan.layout.slots
    shards = {shard.file: ShardFile(shard, tree) for shard in plan.layout.shards}
    try:
        names, in_head = _stored_names(model, slots, head), head.tensors if head else ()
        for buffer, statistic in _running_statistics(model):
            if buffer in in_head:
                continue
            if buffer not in names:
                raise MergeError("is in no file of the merge", where=buffer, hint="leave `repair` out: repair: false")
            name, slot = names[buffer], slots[names[buffer]]
            raw = bytes_of(statistic.to(slot.dtype).contiguous())
            shards[slot.file].write(slot, 0, raw)
            finished[name] = replace(finished[name], digest=blake3(raw).hexdigest())
        for shard in shards.values():
            shard.sync()
    finally:
        for shard in shards.values():
            shard.close()
    used = calibration.record
    return replace(execution, finished=finished), Repair(rows=used.rows, digest=used.digest, layers=layers)


def _stored_names(model: nn.Module, stored: Iterable[str], head: HeadPlan | None) -> dict[str, str]:
    """By a tensor's name in the model, the one that the merge stores it under."""
    prefix, reference = (head.prefix, head.reference_prefix) if head else ("", "")
    own = {prefix + name.removeprefix(reference): name for name in stored}
    return {in_module: own[name] for name, in_module in own_names(model, own).items()}


def _running_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in model.named_buffers():
        if name.endswith(STATISTICS):
            yield name, buffer


@contextmanager
def _one_thread() -> Iterator[None]:
    # Convolutions add up in another order for each number of threads.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
