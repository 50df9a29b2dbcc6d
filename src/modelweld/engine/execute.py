"""A plan made real: shards laid out, a journal to go on from, all tensors made, by threads, processes or a cluster.

`outputs` is the directory being filled, `threads` make its tensors in this process, `processes` share them out to one
process a device, `cluster` to the tasks of a Ray cluster.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelweld.checkpoints.shards import disk_errors
from modelweld.engine.executors.cluster import run_on_cluster
from modelweld.engine.executors.placement import DevicePlacement
from modelweld.engine.executors.processes import run_in_processes
from modelweld.engine.executors.threads import run_in_threads
from modelweld.engine.output.journal import TensorRecord
from modelweld.engine.output.shards import Output, Syncer
from modelweld.engine.output.side_files import write_beside
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import Plan
from modelweld.engine.progress import NullProgress, Progress


@dataclass
class Execution:
    """What happened: every tensor's record, how many were taken over from an earlier attempt, seconds by phase.

    `workers_peak_bytes` is the summed peak memory of the worker processes.
    """

    finished: dict[str, TensorRecord]
    resumed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    workers_peak_bytes: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What a device's memory did not allow, for the report."""
        found = []
        for fallback, what in (("cpu", "merged on the CPU"), ("blocks", "merged in smaller blocks")):
            names = [entry.tensor for entry in self.finished.values() if entry.fallback == fallback]
            if names:
                found.append(f"the device's memory ran out: {len(names)} tensors were {what}, first {names[0]}")
        return tuple(found)


def execute(
    plan: Plan,
    inputs: Inputs,
    directory: Path,
    *,
    placement: DevicePlacement,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Execution:
    """Write the plan's weights, heads and side files into `<directory>/tree`, going on from its journal.

    Raises what the methods and the disk raise; what was finished stays journalled. The bytes written depend neither on
    `threads` nor on how many processes the placement makes.
    """
    (execution,) = execute_together(
        [(plan, directory)], inputs, placement=placement, threads=threads, memory_limit=memory_limit, progress=progress
    )
    return execution


def execute_together(
    candidates: Sequence[tuple[Plan, Path]],
    inputs: Inputs,
    *,
    placement: DevicePlacement,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> list[Execution]:
    """As `execute`, for plans over the same inputs, each with its directory: what they share is done once.

    A weight is made for all plans in turn, while it is in memory and its joint basis is known; where plans agree on a
    tensor it is made once and copied. The bytes are those of separate executions.
    """
    progress = progress or NullProgress()
    count = placement.threads_each(threads)
    limit = placement.limit_each(memory_limit)
    first = candidates[0][0]
    progress.begin(first.read_bytes, len(first.tensors))
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(candidates[0][1]))
        started, peak = time.perf_counter(), 0
        outputs = [Output.resumed(plan, directory, count, stack) for plan, directory in candidates]
        syncer = stack.enter_context(Syncer())
        for output in outputs:
            output.sync_with(syncer)
        prepared = time.perf_counter()
        pending = []
        for tensor in first.tensors:
            if all(tensor.name in output.finished for output in outputs):
                progress.advance(tensor.read_bytes)
                progress.finished(tensor.name)
            else:
                pending.append(tensor)
        if placement.ray is not None and pending:
            peak = run_on_cluster(outputs, inputs, pending, placement, threads, memory_limit, progress)
        elif len(placement.devices) > 1 and pending:
            peak = run_in_processes(outputs, inputs, pending, placement.devices, count, limit, progress)
        else:
            run_in_threads(
                outputs,
                inputs,
                pending,
                device=placement.devices[0],
                threads=count,
                memory_limit=limit,
                progress=progress,
            )
        merged = time.perf_counter()
        for output in outputs:
            write_beside(output.plan, inputs, output.tree)
        progress.advance(sum(head.bytes for head in first.heads))
        syncer.wait()
        seconds = {"prepare": prepared - started, "merge": merged - prepared, "sync": time.perf_counter() - merged}
    return [Execution(dict(sorted(output.finished.items())), output.taken_over, seconds, peak) for output in outputs]
