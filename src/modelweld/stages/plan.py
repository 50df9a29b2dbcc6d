"""Looking ahead: what a merge would do and take here, from headers alone and a two-second calibration.

Of a params.yaml whose models are not fetched yet, headers are read where the models are, and what fetching them and
keeping them in DVC's cache takes is counted too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelweld.config import Recipe, load_params, load_recipe
from modelweld.config.loading import is_params
from modelweld.engine import Inputs, Plan, build, open_inputs, place, require_replaceable
from modelweld.engine.cost.estimate import calibrate, existing_parent, flops, peak_memory, seconds
from modelweld.engine.cost.memory import peak_resident, working_bytes
from modelweld.engine.plan.records import dtype_name
from modelweld.engine.run.device_stream import free_on
from modelweld.errors import DiskFull, MergeError
from modelweld.stages.sighting import sighted

if TYPE_CHECKING:
    from modelweld.alignment.cost import AlignmentCost

_GB = 1e9


@dataclass(frozen=True)
class PlanEstimate:
    """A plan and what it takes: bytes needed and available, expected seconds.

    `fetch` are the bytes of sources that are not here yet, by entry of the lock, and `seen` where each of their models
    was looked at. `baseline_bytes` is what the baselines of a pipeline write, `cache_bytes` the second copy of a
    stage's output that there is until DVC has linked it into its cache.
    """

    plan: Plan
    experts: int
    device: str
    threads: int
    memory_bytes: int
    memory_available: int
    device_memory_bytes: int
    device_memory_available: int | None
    disk_bytes: int
    disk_free: int
    seconds: float
    fetch: Mapping[str, int] = field(default_factory=dict)
    seen: Mapping[str, str] = field(default_factory=dict)
    baseline_bytes: int = 0
    cache_bytes: int = 0
    alignment: AlignmentCost | None = None

    def data(self) -> dict[str, Any]:
        """Everything for machines, tensor by tensor."""
        tensors = [
            {
                **tensor.data(),
                "read_bytes": tensor.read_bytes,
                "write_bytes": tensor.write_bytes,
                "flops": flops(tensor, self.experts),
                "working_bytes": working_bytes(tensor, self.experts),
            }
            for tensor in self.plan.tensors
        ]
        return {
            "tensors": tensors,
            "heads": [{"task": h.task, "model": h.model, "tensors": list(h.tensors)} for h in self.plan.heads],
            "left_out": dict(self.plan.left_out),
            "files": list(self.plan.files),
            "notes": list(self.plan.notes),
            "shards": {shard.file: shard.size for shard in self.plan.layout.shards},
            "device": self.device,
            "threads": self.threads,
            "read_bytes": self.plan.read_bytes,
            "needs": {
                "memory_bytes": self.memory_bytes,
                "device_memory_bytes": self.device_memory_bytes,
                "disk_bytes": self.disk_bytes,
                "fetch_bytes": sum(self.fetch.values()),
                "baseline_bytes": self.baseline_bytes,
                "cache_bytes": self.cache_bytes,
                "seconds": round(self.seconds, 3),
            },
            "alignment": self.alignment.data() if self.alignment else None,
            "fetch": dict(self.fetch),
            "seen": dict(self.seen),
            "available": {
                "memory_bytes": self.memory_available,
                "device_memory_bytes": self.device_memory_available,
                "disk_bytes": self.disk_free,
            },
            "fits": not self._misfits(),
        }

    def require_fit(self) -> None:
        """Raise MergeError or DiskFull for what this machine cannot hold."""
        for error in self._misfits():
            raise error

    def groups(self) -> list[tuple[str, ...]]:
        """Rows for people: tensors that get the same for the same reason, together."""
        grouped: dict[tuple[str, str, str, str], list[Any]] = {}
        for tensor in self.plan.tensors:
            key = (tensor.method or "copy", tensor.role, dtype_name(tensor.dtype), tensor.reason)
            grouped.setdefault(key, []).append(tensor)
        return [
            (
                str(len(members)),
                how,
                role,
                dtype,
                _size(sum(member.read_bytes for member in members)),
                _size(sum(member.write_bytes for member in members)),
                f"{sum(flops(member, self.experts) for member in members) / 1e9:.2f}",
                reason,
            )
            for (how, role, dtype, reason), members in sorted(grouped.items())
        ]

    def needs(self) -> list[tuple[str, str, str]]:
        """Rows for people: what is needed beside what there is."""
        rows = [
            ("memory", _size(self.memory_bytes), _size(self.memory_available)),
            ("disk", _size(self.disk_bytes), f"{_size(self.disk_free)}{self._disk_parts()}"),
            ("time", f"{self.seconds:.1f} s", f"{self.threads} threads on {self.device}"),
        ]
        if self.alignment is not None:
            rows.append(("of it, alignment", f"{self.alignment.seconds:.1f} s", _size(self.alignment.memory_bytes)))
        if self.device_memory_available is not None:
            rows.append(("device memory", _size(self.device_memory_bytes), _size(self.device_memory_available)))
        return rows

    def remarks(self) -> list[str]:
        """Lines for people: heads, what is left out, notes."""
        lines = [f"head of {h.task}: {len(h.tensors)} tensors, kept from {h.model}" for h in self.plan.heads]
        lines += [f"left out: {name} ({why})" for name, why in self.plan.left_out.items()]
        lines += [self.alignment.line()] if self.alignment else []
        lines.append(f"side files from the reference: {', '.join(self.plan.files) or 'none'}")
        lines += [f"{name} is not fetched: its headers were read at {place}" for name, place in self.seen.items()]
        return lines + [f"note: {note}" for note in self.plan.notes]

    def _disk_parts(self) -> str:
        parts = {
            "to fetch": sum(self.fetch.values()),
            "for the merge": self.plan.write_bytes,
            "for baselines": self.baseline_bytes,
            "until DVC has linked its cache": self.cache_bytes,
        }
        told = [f"{_size(size)} {what}" for what, size in parts.items() if size]
        return f" ({', '.join(told)})" if len(told) > 1 else ""

    def _misfits(self) -> list[MergeError | DiskFull]:
        found: list[MergeError | DiskFull] = []
        if self.memory_bytes > self.memory_available:
            found.append(
                MergeError(
                    f"the merge needs {_size(self.memory_bytes)} of memory, {_size(self.memory_available)} are free",
                    where="plan",
                    hint="use fewer --threads, or give large tensors an element-wise method by a rule",
                )
            )
        if self.device_memory_available is not None and self.device_memory_bytes > self.device_memory_available:
            found.append(
                MergeError(
                    f"the largest tensor needs {_size(self.device_memory_bytes)} on {self.device}, "
                    f"{_size(self.device_memory_available)} are free",
                    where="plan",
                    hint="use --device cpu",
                )
            )
        if self.disk_bytes > self.disk_free:
            found.append(
                DiskFull(
                    f"it takes {_size(self.disk_bytes)} of disk{self._disk_parts()}, {_size(self.disk_free)} are free",
                    where="plan",
                    hint="free space, or name an output on another disk",
                )
            )
        return found


def plan(
    recipe: Recipe | str | Path,
    out: str | Path,
    device: str = "auto",
    *,
    threads: int | None = None,
    memory_limit: int | None = None,
) -> PlanEstimate:
    """What `merge` would do with a recipe (or the `merge:` of a params.yaml), and what it would take on this machine.

    Models of a params.yaml need not be fetched: the headers of their weights are read where they are. Raises what
    `merge` would raise before it reads a weight.
    """
    out = Path(out)
    if isinstance(recipe, Recipe):
        return _estimate_plan(recipe, out, device, threads, memory_limit)
    recipe = Path(recipe)
    if not is_params(recipe):
        return _estimate_plan(load_recipe(recipe), out, device, threads, memory_limit)
    with sighted(load_params(recipe), recipe.parent) as sighting:
        merge = _estimate_plan(sighting.recipe, out, device, threads, memory_limit)
        baselines = sum(_written(baseline) for baseline in sighting.baselines.values())
    # A stage's output lies beside DVC's copy of it until it is linked: one output at a time.
    second = max([*sighting.fetch.values(), merge.plan.write_bytes, baselines])
    needed = sum(sighting.fetch.values()) + merge.plan.write_bytes + baselines + second
    return replace(
        merge,
        fetch=sighting.fetch,
        seen=sighting.seen,
        baseline_bytes=baselines,
        cache_bytes=second,
        disk_bytes=needed,
    )


def _written(recipe: Recipe) -> int:
    with open_inputs(recipe) as inputs:
        return build(recipe, inputs).write_bytes


def _alignment_cost(recipe: Recipe, built: Plan, inputs: Inputs) -> AlignmentCost | None:
    if recipe.alignment is None:
        return None
    # Here, because it brings along transformers and the solvers, which most plans do not need.
    from modelweld.alignment.cost import alignment_cost

    return alignment_cost(recipe, built, inputs, Path())


def _estimate_plan(
    recipe: Recipe, out: Path, device: str, threads: int | None, memory_limit: int | None
) -> PlanEstimate:
    require_replaceable(out)
    placement = place(device)
    processes, each = len(placement.devices), placement.threads_each(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with open_inputs(recipe) as inputs:
            built = build(recipe, inputs)
            rates = calibrate(built, inputs, out)
            experts = len(inputs.experts)
            torch.set_num_threads(before)
            alignment = _alignment_cost(recipe, built, inputs)
    finally:
        torch.set_num_threads(before)
    working = max((working_bytes(tensor, experts, placement.kind) for tensor in built.tensors), default=0)
    limit = placement.limit_each(memory_limit)
    merging = processes * peak_memory(built, experts, each, peak_resident(), limit, placement.kind)
    return PlanEstimate(
        plan=built,
        experts=experts,
        device=device if processes > 1 else str(placement.devices[0]),
        threads=each * processes,
        # Units are matched before the first tensor is merged.
        memory_bytes=max(merging, peak_resident() + alignment.memory_bytes) if alignment else merging,
        memory_available=_available() + peak_resident(),
        device_memory_bytes=working if placement.kind == "cuda" else 0,
        device_memory_available=min(
            (free for free in map(free_on, placement.devices) if free is not None), default=None
        ),
        disk_bytes=built.write_bytes,
        disk_free=shutil.disk_usage(existing_parent(out)).free,
        seconds=seconds(built, experts, rates, each * processes) + (alignment.seconds if alignment else 0.0),
        alignment=alignment,
    )


def _size(size_bytes: float) -> str:
    return f"{size_bytes / _GB:.2f} GB" if size_bytes >= _GB / 10 else f"{size_bytes / 1e6:.2f} MB"


def _available() -> int:
    """Bytes of memory that can still be had here: the kernel's estimate, or the container's limit when lower."""
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    allowed = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return free if allowed == "max" else min(free, int(allowed))
