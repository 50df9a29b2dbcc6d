"""Activations of the units of several models on one calibration set: the other half of a dual similarity.

A group is observed where a layer reads it: at the inputs of the linear and convolutional layers whose weights take its
units in. Groups that no such layer reads (the units of queries and keys) are observed at the outputs that make them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from modelweld.errors import MergeError
from modelweld.symmetry.families import split
from modelweld.symmetry.similarity import Activations
from modelweld.symmetry.spec import Piece, Spec, length, pieces

Batch = Mapping[str, Any] | tuple[Any, ...]
ROWS = 16
# A group, and at which of the tensors that hold it, in their order.
Seen = tuple[str, int]


@dataclass(frozen=True)
class HookPoint:
    """Where a group is seen: a module's input or output, the piece of its units' axis, and how long that is."""

    group: str
    module: str
    reads: bool
    piece: Piece
    length: int
    wanted: frozenset[str]


def hook_points(model: nn.Module, spec: Spec) -> list[HookPoint]:
    """Every point at which a group of the spec is observed, inputs before outputs."""
    found: dict[str, list[HookPoint]] = {name: [] for name in spec.groups}
    for tensor, axes in spec.axes.items():
        module, _, leaf = tensor.rpartition(".")
        if leaf != "weight" or len(axes) < 2 or not takes_units_in(model.get_submodule(module)):
            continue
        for dim, factors in enumerate(axes):
            for piece in pieces(factors):
                here = {factor.group for factor in piece.factors if factor.group}
                for name in here:
                    wanted = frozenset((name, *spec.groups[name].within))
                    if here == wanted:
                        reads = (tensor, dim) in spec.reads
                        found[name].append(HookPoint(name, module, reads, piece, length(factors), wanted))
    chosen = []
    for seen in found.values():
        inputs = [point for point in seen if point.reads]
        chosen += inputs or seen
    return chosen


def observe(
    models: Sequence[nn.Module],
    spec: Spec,
    batches: Iterable[Batch],
    *,
    whole: bool = True,
    scratch: Path | None = None,
) -> Mapping[str, Tensor]:
    """By group, the correlation of (models · units) over all batches, for `align` and `zip_models`.

    Without `whole`, only the first model's units are correlated, with all others, which is what `align` takes: a small
    part of the memory. With a `scratch` folder the sums are kept there, and one group's correlation is made when it is
    asked for; the folder has to stay until the last one was. A group observed at several points has the mean of their
    correlations. Positions that an `attention_mask` hides are left out. The models run side by side, a few rows of the
    same batch at a time, and the activations of one point are in memory. Raises MergeError for activations that are not
    finite, naming the group, and for an empty calibration set.
    """
    chosen = hook_points(models[0], spec)
    gathered: dict[Seen, Activations] = {}

    def add(seen: Seen, parts: Sequence[Tensor]) -> None:
        if seen not in gathered:
            file = None if scratch is None else scratch / f"{len(gathered)}.sums"
            gathered[seen] = Activations(None if whole else len(parts[0]), file)
        try:
            gathered[seen].add(*parts)
        except MergeError as error:
            raise MergeError(error.what, where=f"the units of {seen[0]}", hint=error.hint) from error

    with ThreadPoolExecutor(len(models)) as pool:
        for batch in batches:
            for part in _parts(batch):
                _together(pool, models, chosen, part, add)
    if chosen and not gathered:
        raise MergeError("the calibration set is empty", hint="give a few hundred rows")
    found = Observed(gathered)
    return found if scratch is not None else found.held()


class Observed(Mapping[str, Tensor]):
    """Correlations by group, each made from its sums when it is asked for."""

    def __init__(self, gathered: Mapping[Seen, Activations]) -> None:
        self._sums: dict[str, list[Activations]] = {}
        for (group, _), sums in gathered.items():
            self._sums.setdefault(group, []).append(sums)

    def __getitem__(self, group: str) -> Tensor:
        first, *others = self._sums[group]
        mean = first.correlation()
        for other in others:
            mean += other.correlation()
        return mean.div_(1 + len(others))

    def __contains__(self, group: object) -> bool:
        return group in self._sums

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def held(self) -> dict[str, Tensor]:
        """All of them, the sums let go of one by one."""
        made: dict[str, Tensor] = {}
        for group in list(self._sums):
            made[group] = self[group]
            del self._sums[group]
        return made


def takes_units_in(module: nn.Module) -> bool:
    """Whether a module is a linear or convolutional layer, all of whose outputs read all of its inputs."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups == 1
    # transformers' Conv1D is a linear layer that stores its weight the other way around.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class _LockStep:
    """A barrier for the models at every hook point, so that only one point's activations are in memory."""

    def __init__(self, models: int, add: Callable[[Seen, Sequence[Tensor]], None]) -> None:
        self._add = add
        self._arrived: list[tuple[Seen | None, Tensor]] = [(None, torch.empty(0))] * models
        self._barrier = Barrier(models, self._take)

    def arrive(self, model: int, seen: Seen | None, value: Tensor) -> None:
        self._arrived[model] = (seen, value)
        self._barrier.wait()

    def give_up(self) -> None:
        self._barrier.abort()

    def _take(self) -> None:
        first = self._arrived[0][0]
        other = next((seen for seen, _ in self._arrived if seen != first), first)
        if other != first:
            name = (first or other or ("", 0))[0]
            raise MergeError("is not seen in all models", where=name, hint="align models of one architecture")
        if first is not None:
            parts, self._arrived = [value for _, value in self._arrived], [(None, torch.empty(0))] * len(self._arrived)
            self._add(first, parts)


def _parts(batch: Batch) -> Iterator[Batch]:
    """A batch, a few rows at a time: activations inside a wide layer are many times as large as its input."""
    tensors = [value for value in (batch if isinstance(batch, tuple) else batch.values()) if isinstance(value, Tensor)]
    rows = max((len(tensor) for tensor in tensors if tensor.ndim), default=0)

    def cut(value: Any, start: int) -> Any:
        whole = not isinstance(value, Tensor) or not value.ndim or len(value) != rows
        return value if whole else value[start : start + ROWS]

    for start in range(0, rows, ROWS):
        if isinstance(batch, tuple):
            yield tuple(cut(value, start) for value in batch)
        else:
            yield {name: cut(value, start) for name, value in batch.items()}


def _together(
    pool: ThreadPoolExecutor,
    models: Sequence[nn.Module],
    chosen: Sequence[HookPoint],
    batch: Batch,
    add: Callable[[Seen, Sequence[Tensor]], None],
) -> None:
    """Run all models on a batch side by side, and `add` what they do at each point they come to."""
    meeting = _LockStep(len(models), add)

    def run(number: int) -> None:
        try:
            _watch(models[number], chosen, batch, lambda seen, value: meeting.arrive(number, seen, value))
            meeting.arrive(number, None, torch.empty(0))
        except BaseException:
            # The others must not wait for a model that has failed.
            meeting.give_up()
            raise

    running = [pool.submit(run, number) for number in range(len(models))]
    errors = [error for error in (one.exception() for one in running) if error is not None]
    first_failures = [error for error in errors if not isinstance(error, BrokenBarrierError)]
    if errors:
        raise (first_failures or errors)[0]


def _watch(model: nn.Module, chosen: Sequence[HookPoint], batch: Batch, tell: Callable[[Seen, Tensor], None]) -> None:
    """One forward that passes on the activations of each point, as (units, samples), in order of appearance."""
    taken: dict[str, list[ref[Tensor]]] = {}
    args, kwargs = (batch, {}) if isinstance(batch, tuple) else ((), dict(batch))
    mask = kwargs.get("attention_mask")

    def keep(point: HookPoint, module: nn.Module, value: Any) -> None:
        known = taken.setdefault(point.group, [])
        # Queries, keys and values read one and the same tensor: it has one vote.
        if isinstance(value, Tensor) and not any(value is other() for other in known):
            known.append(ref(value))
            axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else value.ndim - 1
            tell((point.group, len(known) - 1), _units(value, axis, point, mask))

    handles = []
    for point in chosen:
        module = model.get_submodule(point.module)
        if point.reads:
            handles.append(module.register_forward_pre_hook(lambda m, inputs, p=point: keep(p, m, inputs[0])))
        else:
            handles.append(module.register_forward_hook(lambda m, _, output, p=point: keep(p, m, output)))
    try:
        with torch.inference_mode():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _units(value: Tensor, axis: int, point: HookPoint, mask: Tensor | None) -> Tensor:
    if mask is not None and axis == 2 and value.shape[:2] == mask.shape:
        value, axis = value[mask.bool()], 1  # (batch, positions, features) -> (positions, features)
    if value.shape[axis] != point.length:
        raise MergeError(
            f"{value.shape[axis]} units were observed, the symmetry spec has {point.length}",
            where=point.module,
            hint="derive the spec from this model's own config",
        )
    apart, front = split(value, axis, point.piece, point.wanted)  # (…, factor, …, factor, …)
    rest = [dim for dim in range(apart.ndim) if dim not in front]
    units = math.prod(apart.shape[dim] for dim in front)
    return apart.permute(*front, *rest).reshape(units, -1)  # (units, samples)
