"""The cost of an alignment: rows to forward, similarities, assignments, memory, and time on this machine.

Counted on the architecture without weights; matrix products, assignments and zips are timed here in a short trial each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modelweld.alignment.aligning import models_for
from modelweld.alignment.batch_statistics import recomputes_statistics
from modelweld.alignment.models import AlignedModel, architecture
from modelweld.config import Recipe
from modelweld.config.align import Align
from modelweld.engine import Inputs, Plan
from modelweld.engine.plan.inputs import task_of
from modelweld.symmetry import Spec
from modelweld.symmetry.families import Family, families
from modelweld.symmetry.instances import example_inputs
from modelweld.symmetry.matching import match
from modelweld.symmetry.observing import HookPoint, hook_points, takes_units_in
from modelweld.symmetry.zipping import zip_units

# Sweeps of a search in which most families are matched again, as seen with ResNet-20 and BERT: later ones skip those
# whose neighbours stayed, which clusters hardly ever do.
SWEEPS = {"align": 4, "zip": 12}
# Two rows, before and after, for the invariance check and again for what was found.
_CHECK_ROWS = 8
_UNITS = 512
# Measured from 256 to 2048 units: an assignment grows with this power of them, a zip with the square.
_ASSIGNMENT_POWER = 2.2
_FLOAT64 = 8


@dataclass(frozen=True)
class AlignmentCost:
    """Estimated cost of an alignment, including recomputed batch statistics.

    `forwarded` counts rows over all models and values of alpha. `group` is the one that takes the most memory,
    `group_bytes` the memory of its similarities and of the features they are computed from.
    """

    mode: str
    models: int
    groups: int
    forwarded: int
    forward_flops: float
    similarity_flops: float
    matches: int
    group: str
    group_units: int
    group_bytes: int
    memory_bytes: int
    disk_bytes: int
    seconds: float

    def data(self) -> dict[str, Any]:
        """For machines: JSON-able."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}

    def line(self) -> str:
        """For people: everything but memory and time."""
        zipped = "zips" if self.mode == "zip" else "assignments"
        return (
            f"alignment of {self.models} models: {self.groups} groups of units, {self.forwarded} rows forwarded "
            f"({self.forward_flops / 1e9:.1f} GFLOP), similarities {self.similarity_flops / 1e9:.1f} GFLOP, "
            f"{self.matches} {zipped}; largest group {self.group} ({self.group_units} units, "
            f"{self.group_bytes / 1e6:.1f} MB)"
        )


def alignment_cost(recipe: Recipe, plan: Plan, inputs: Inputs, root: Path) -> AlignmentCost | None:
    """The cost of the alignment that a merge would do; None if it has no units to match.

    Raises what the merge would raise for models that cannot be aligned.
    """
    settings = recipe.alignment
    adapters = all(expert.adapter is not None for expert in inputs.experts)
    if settings is None or settings.mode == "none" or adapters:
        return None
    common, models = models_for(recipe, settings, plan, inputs, root)
    module = architecture(models[0], inputs)
    parameter_bytes = sum(4 * parameter.numel() for parameter in module.parameters())
    found, count, whole = list(families(common).values()), len(models), settings.mode == "zip"
    runs = _Runs.of(settings, plan, inputs, count)
    row_flops, seen = _look(module, models[0], settings)
    works = [_work(common, family, count, whole) for family in found]
    sweeps = SWEEPS[settings.mode] * (len(settings.grid) if settings.alpha == "auto" else 1)
    products = sweeps * sum(work.flops for work in works)
    products += sum(2.0 * _pairs(units, count, whole) * positions * runs.observed for units, positions in seen)
    largest, most = max(zip(found, works, strict=True), key=lambda one: one[1].most_bytes)
    rates = _Rates.of_this_machine(whole)
    matching = sweeps * sum(_matching(common, family, count, whole, rates.match_s) for family in found)
    ordering = sweeps * rates.entry_s * sum(work.entries for work in works)
    forwards = row_flops * (runs.rows + _CHECK_ROWS * count)
    return AlignmentCost(
        mode=settings.mode,
        models=count,
        groups=len(common.groups),
        forwarded=runs.rows,
        forward_flops=row_flops * runs.rows,
        similarity_flops=products,
        matches=sweeps * len(found) * (1 if whole else count - 1),
        group=largest.outer,
        group_units=_units(common, largest.outer),
        group_bytes=most.most_bytes,
        # The invariance check holds a model and, tensor by tensor, what it permutes.
        memory_bytes=runs.held * parameter_bytes + max(most.most_bytes, parameter_bytes),
        disk_bytes=sum(_FLOAT64 * _pairs(units, count, whole) for units, _ in seen) if runs.observed else 0,
        # In float32, but smaller and less regular: forwards go about as fast as large products in float64.
        seconds=(forwards + products) / rates.flops + ordering + matching,
    )


@dataclass(frozen=True)
class _Runs:
    """How many rows go through a model, and how many of these are looked at; how many models are in memory then."""

    rows: int
    observed: int
    held: int

    @classmethod
    def of(cls, settings: Align, plan: Plan, inputs: Inputs, models: int) -> _Runs:
        named = bool(settings.calibration)
        seen = settings.rows if named and settings.space != "weights" else 0
        extra_rows = settings.rows if recomputes_statistics(settings, plan) else 0
        tasks = sum(task_of(one) in (settings.validation or {}) for one in inputs.experts)
        tries = len(settings.grid) if settings.alpha == "auto" and seen else 0
        rows = seen * models + extra_rows + tries * tasks * (settings.validation_rows + extra_rows)
        return cls(rows, seen, models if seen else 1)


def _look(module: nn.Module, model: AlignedModel, settings: Align) -> tuple[float, list[tuple[int, int]]]:
    """Operations of one row, and for every hook point its number of units and of positions.

    A row of text is taken to be as long as it may be, and every matrix to be used once a position. What a row of
    images comes to depends on strides and pools: it goes through the architecture alone, which computes nothing.
    """
    shown = hook_points(module, model.module_spec)
    call = example_inputs(module)
    if "input_ids" in call:
        layers = [layer for layer in module.modules() if takes_units_in(layer)]
        entries = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        return 2.0 * entries * settings.max_length, [
            (_units_at(model.module_spec, point), settings.max_length) for point in shown
        ]
    seen: list[tuple[int, int]] = []

    def watch(point: HookPoint, value: Tensor) -> None:
        seen.append((_units_at(model.module_spec, point), value.numel() // len(value) // point.length))

    handles = []
    for point in shown:
        layer = module.get_submodule(point.module)
        if point.reads:
            handles.append(layer.register_forward_pre_hook(lambda _, inputs, at=point: watch(at, inputs[0])))
        else:
            handles.append(layer.register_forward_hook(lambda _, inputs, output, at=point: watch(at, output)))
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(**call)
    finally:
        for handle in handles:
            handle.remove()
    return counter.get_total_flops() / len(call["pixel_values"]), seen


def _units_at(spec: Spec, point: HookPoint) -> int:
    """The number of units that are observed at a hook point."""
    return math.prod(spec.groups[name].size for name in point.wanted)


@dataclass(frozen=True)
class _Work:
    """What comparing a family's units by weights takes: operations, entries permuted, bytes at most."""

    flops: float
    entries: float
    most_bytes: int


def _work(spec: Spec, family: Family, models: int, whole: bool) -> _Work:
    flops, entries, most = 0.0, 0.0, 0
    for member in family.members:
        units, sites = _units(spec, member), family.of(member)
        pairs, features = _pairs(units, models, whole), sum(site.features for site in sites)
        flops += 2.0 * pairs * features
        entries += float(models * units * features)
        widest = max((site.features for site in sites), default=0)
        most = max(most, _FLOAT64 * (2 * models * units * widest + 2 * pairs))
    return _Work(flops, entries, most)


def _units(spec: Spec, group: str) -> int:
    """How many units a group has over all elements that it lies inside of."""
    found = spec.groups[group]
    return found.size * math.prod(spec.groups[outer].size for outer in found.within)


def _pairs(units: int, models: int, whole: bool) -> int:
    """Entries of a similarity: all units with all, or the first model's with the others'."""
    return (models * units) ** 2 if whole else (models - 1) * units * units


def _matching(spec: Spec, family: Family, models: int, whole: bool, trial: float) -> float:
    """Seconds of matching a family once, `trial` being those of _UNITS units here."""
    if whole:
        return sum(trial * (models * _units(spec, member) / _UNITS) ** 2 for member in family.members)
    outer = spec.groups[family.outer].size
    inner = sum(outer**2 * (spec.groups[name].size / _UNITS) ** _ASSIGNMENT_POWER for name in family.inner)
    return float((models - 1) * trial * ((outer / _UNITS) ** _ASSIGNMENT_POWER + inner))


@dataclass(frozen=True)
class _Rates:
    """Measured here: operations a second, seconds to permute one weight, and to match _UNITS units."""

    flops: float
    entry_s: float
    match_s: float

    @classmethod
    def of_this_machine(cls, whole: bool) -> _Rates:
        drawn = np.random.default_rng(0).standard_normal((_UNITS, _UNITS))
        square, order = torch.from_numpy(drawn), torch.randperm(_UNITS)

        def permute() -> object:
            moved = square.float().index_select(0, order).index_select(1, order).double()
            return moved.sub_(moved.mean(dim=1, keepdim=True)).div_(
                torch.linalg.vector_norm(moved, dim=1, keepdim=True)
            )

        def assign() -> object:
            return zip_units(drawn.astype(np.float32), 2) if whole else match(drawn)

        flops = 2.0 * _UNITS**3 / _timed(lambda: square @ square)
        return cls(flops, _timed(permute) / _UNITS**2, _timed(assign))


def _timed(trial: Callable[[], object]) -> float:
    """The best of three, after a first that compiles and warms up."""
    trial()
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        trial()
        spent.append(time.perf_counter() - started)
    return max(min(spent), 1e-9)
