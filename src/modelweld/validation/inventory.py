"""The tensor inventory: every tensor of every checkpoint measured once, against the base, in one pass over the files.

Half a megabyte or so is read of the base at a time and, beside it, of each expert. Of a whole tensor only sums and a
sketch of 64 columns are kept, and the base is read once however many experts there are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas
import torch
from blake3 import blake3

from modelweld.checkpoints import Checkpoint, TensorInfo
from modelweld.checkpoints.adapter import Adapter
from modelweld.checkpoints.names import NameDiff, diff_names, has_task_head, match_names
from modelweld.validation.adapters import FactorDelta
from modelweld.validation.measures import (
    RANK_TOLERANCE,
    Delta,
    Measure,
    chunks,
    dtype_class,
    dtype_of,
    is_real,
    measured,
    read_chunk,
    shape_of,
)

__all__ = ["COLUMNS", "Inventory", "take_inventory"]

WORKERS = 8

COLUMNS = {
    "name": "object",
    "role": "object",
    "shape": "object",
    "base_shape": "object",
    "dimensions": "int64",
    "dtype": "object",
    "base_dtype": "object",
    "dtype_class": "object",
    "base_dtype_class": "object",
    "finite_share": "float64",
    "norm": "float64",
    "delta_norm": "float64",
    "relative_delta": "float64",
    "matrix_delta": "float64",
    "changed_share": "float64",
    "delta_rank": "float64",
}


@dataclass(frozen=True)
class Inventory:
    """One model's tensors as rows, and what they say together.

    `relative_delta` is ‖W - W_base‖ / ‖W_base‖ over all matrices (norm weights are near 1 in any model and would hide
    that the matrices have nothing in common), `changed_share` the share of backbone elements that differ from the base
    rounded to the model's dtype, `backbone` a digest of the backbone's values whatever their names, shards and dtype
    (None when a tensor has no counterpart in the base); the base has none of the three. `head_shapes` are the shapes of
    the head's tensors.
    """

    frame: pandas.DataFrame
    parameters: int
    relative_delta: float | None = None
    changed_share: float | None = None
    backbone: str | None = None
    head_shapes: tuple[tuple[int, ...], ...] = ()


def take_inventory(
    base: Checkpoint, experts: Mapping[str, Checkpoint | Adapter], advance: Callable[[int], object] = lambda _: None
) -> tuple[Inventory, dict[str, Inventory]]:
    """The inventories of the base and of every expert; `advance` is called with the bytes of the base that are done.

    An adapter has a row for each weight it adapts, measured in its factors, and for each tensor it stores whole.

    Raises CheckpointError when a file cannot be read to its end.
    """
    surveys = {name: _survey(model, base) for name, model in experts.items()}
    own = _Survey(base, NameDiff({}, (), (), ()))
    tensors = sorted(base.tensors.values(), key=lambda item: item.name)

    def compare(info: TensorInfo) -> tuple[Measure, dict[str, Delta], dict[str, FactorDelta]]:
        measure, deltas = Measure(info), {}
        for name, survey in surveys.items():
            stored = survey.names.names.get(info.name)
            if stored is not None and _comparable(survey.checkpoint.tensors[stored], info):
                deltas[name] = Delta(survey.checkpoint.tensors[stored])
        for start, reference in chunks(base, info):
            exact = reference.double()
            squares = measure.add(exact)
            for name, delta in deltas.items():
                mine = read_chunk(surveys[name].checkpoint, delta.info, start, reference.numel())
                delta.add_beside(mine, reference, exact, squares)
            advance(reference.nbytes)
        for delta in deltas.values():
            delta.finish()
        factors = {name: survey.factors_of(info) for name, survey in surveys.items()}
        return measure, deltas, {name: found for name, found in factors.items() if found is not None}

    # A chunk is far too small to be shared among threads, whole tensors are not; and a sum taken by one thread does
    # not depend on how many there are.
    with _one_thread_an_operation(), ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1), initializer=_alone) as pool:
        for measure, deltas, factors in pool.map(compare, tensors):
            own.rows.append(measure.row("backbone", None))
            for name, survey in surveys.items():
                if name in factors:
                    survey.settle_factors(measure, factors[name])
                else:
                    survey.settle(measure, deltas.get(name))
        for survey in surveys.values():
            survey.measure_rest()
    return own.inventory(compared=False), {name: survey.inventory() for name, survey in surveys.items()}


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    before = torch.get_num_threads()
    _alone()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _alone() -> None:
    torch.set_num_threads(1)


def _survey(model: Checkpoint | Adapter, base: Checkpoint) -> _Survey:
    if not isinstance(model, Adapter):
        return _Survey(model, diff_names(base, model))
    whole = {name: model.name_map.names[name] for name in model.touched - model.pairs.keys()}
    return _Survey(model.checkpoint, NameDiff(whole, model.name_map.head, (), ()), adapter=model, base=base)


@dataclass
class _Survey:
    """What has been measured of one model so far; `adapter`, `base` and its sums are there when it is an adapter."""

    checkpoint: Checkpoint
    names: NameDiff
    adapter: Adapter | None = None
    base: Checkpoint | None = None
    rows: list[dict[str, object]] = field(default_factory=list)
    digest: blake3 = field(default_factory=blake3)
    deltas: list[Delta] = field(default_factory=list)
    factors: list[FactorDelta] = field(default_factory=list)
    beside: list[Measure] = field(default_factory=list)
    whole: bool = True

    def factors_of(self, info: TensorInfo) -> FactorDelta | None:
        """What an adapter's factors say of a base tensor; None for a whole model, and for what it does not adapt."""
        if self.adapter is None or info.name not in self.adapter.pairs:
            return None
        return FactorDelta(self.adapter, info, RANK_TOLERANCE)

    def settle_factors(self, measure: Measure, delta: FactorDelta) -> None:
        """Write down the row of an adapted base tensor."""
        base, norm = measure.info, math.sqrt(delta.squares)
        relative = norm / math.sqrt(measure.squares) if measure.squares > 0 else math.nan
        self.digest.update(f"{base.name} {shape_of(base)}\n".encode() + delta.digest)
        self.factors.append(delta)
        self.beside.append(measure)
        row: dict[str, object] = dict.fromkeys(COLUMNS)
        row |= {"name": base.name, "role": "backbone", "dimensions": len(base.shape)}
        # Factors are kept in more digits than their base on purpose: their dtype is not compared, but its class is.
        row |= {"dtype": str(delta.dtype).removeprefix("torch."), "dtype_class": "float"}
        row |= {"shape": shape_of(base), "base_shape": shape_of(base), "base_dtype_class": dtype_class(base)}
        row |= {"finite_share": delta.finite_share, "delta_norm": norm, "delta_rank": delta.rank}
        row |= {"relative_delta": relative, "matrix_delta": relative, "changed_share": delta.changed / base.elements}
        self.rows.append(row)

    def settle(self, measure: Measure, delta: Delta | None) -> None:
        """Write down the row of a base tensor that all chunks of were seen."""
        base = measure.info
        if self.adapter is not None and base.dtype.is_floating_point:
            self.beside.append(measure)
        stored = self.names.names.get(base.name)
        self.digest.update(f"{base.name} {shape_of(base)}\n".encode())
        if delta is not None:
            self.digest.update(delta.digest.digest())
            self.rows.append(delta.row("backbone", base))
            if delta.info.dtype.is_floating_point:
                self.deltas.append(delta)
        elif stored is not None:
            self.whole = False
            self.rows.append(measured(self.checkpoint, self.checkpoint.tensors[stored]).row("backbone", base))
        elif base.name in self.names.missing:
            self.whole = False
            self.rows.append(_absent(base))

    def measure_rest(self) -> None:
        """Measure what has no counterpart: the head, extra tensors, and buffers that the base does not keep."""
        used = set(self.names.names.values())
        # An adapter's checkpoint also holds the base's tensors and the factors.
        rest = self.names.head if self.adapter is not None else self.checkpoint.tensors.keys() - used
        for name, info in sorted((name, self.checkpoint.tensors[name]) for name in rest):
            if name not in used:
                role = "head" if name in self.names.head else "extra" if name in self.names.extra else "ignored"
                self.rows.append(measured(self.checkpoint, info).row(role, None))

    def inventory(self, compared: bool = True) -> Inventory:
        frame = pandas.DataFrame(self.rows, columns=list(COLUMNS)).astype(COLUMNS).sort_values("name")
        reference, moved, elements = self._sums()
        changed = sum(delta.changed for delta in self.deltas) + sum(delta.changed for delta in self.factors)
        return Inventory(
            frame=frame.reset_index(drop=True),
            parameters=sum(info.elements for info in self._own()),
            relative_delta=math.sqrt(moved / reference) if compared and reference > 0 else None,
            changed_share=changed / elements if compared and elements else None,
            backbone=self.digest.hexdigest() if compared and self.whole else None,
            head_shapes=self._head_shapes(),
        )

    def _sums(self) -> tuple[float, float, int]:
        """Squared norms of the base and of the deltas, over matrices; and of how many elements deltas were looked for.

        An adapter leaves most of the base alone, which counts all the same.
        """
        matrices = [delta for delta in self.deltas if len(delta.info.shape) >= 2]
        matrices = matrices or (self.deltas if self.adapter is None else [])
        sound = [delta for delta in matrices if math.isfinite(delta.delta_squares + delta.base_squares)]
        moved = math.fsum(delta.delta_squares for delta in sound)
        if self.adapter is None:
            reference = math.fsum(delta.base_squares for delta in sound)
            return reference, moved, sum(delta.info.elements for delta in self.deltas)
        moved += math.fsum(delta.squares for delta in self.factors if math.isfinite(delta.squares))
        squares = [beside.squares for beside in self.beside if len(beside.info.shape) >= 2]
        reference = math.fsum(value for value in squares if math.isfinite(value))
        return reference, moved, sum(beside.info.elements for beside in self.beside)

    def _own(self) -> list[TensorInfo]:
        tensors = self.checkpoint.tensors
        if self.adapter is None:
            return list(tensors.values())
        factors = [name for pair in self.adapter.pairs.values() for name in (pair.A, pair.B)]
        return [tensors[name] for name in {*factors, *self.names.names.values(), *self.names.head}]

    def _head_shapes(self) -> tuple[tuple[int, ...], ...]:
        tensors, head = self.checkpoint.tensors, self.names.head
        if self.base is not None and not head and has_task_head(self.base):
            head = match_names(self.base, self.base, "base").head
        return tuple(tensors[name].shape for name in head)


def _absent(base: TensorInfo) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(COLUMNS)
    row |= {"name": base.name, "role": "missing", "dimensions": len(base.shape)}
    return row | {"base_shape": shape_of(base), "base_dtype": dtype_of(base), "base_dtype_class": dtype_class(base)}


def _comparable(info: TensorInfo, base: TensorInfo) -> bool:
    return info.shape == base.shape and is_real(base) and dtype_class(info) == dtype_class(base)
