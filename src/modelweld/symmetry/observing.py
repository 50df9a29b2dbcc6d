"""What the units of several models do on one calibration set: the activations side of a dual similarity.

A group is seen where something reads it: at the inputs of the linear and convolutional layers whose weights take its
units in. Groups that nothing linear reads (the insides of queries and keys) are seen at the outputs that make them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelweld.errors import MergeError
from modelweld.symmetry.families import split
from modelweld.symmetry.similarity import Activations
from modelweld.symmetry.spec import Piece, Spec, length, pieces

Batch = Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Place:
    """Where a group is seen: a module's input or output, the piece of its units' axis, and how long that is."""

    group: str
    module: str
    reads: bool
    piece: Piece
    length: int
    wanted: frozenset[str]


def places(model: nn.Module, spec: Spec) -> list[Place]:
    """Every place at which a group of the spec is seen, inputs before outputs."""
    found: dict[str, list[Place]] = {name: [] for name in spec.groups}
    for tensor, axes in spec.axes.items():
        module, _, leaf = tensor.rpartition(".")
        if leaf != "weight" or len(axes) < 2 or not _takes_units_in(model.get_submodule(module)):
            continue
        for dim, factors in enumerate(axes):
            for piece in pieces(factors):
                here = {factor.group for factor in piece.factors if factor.group}
                for name in here:
                    wanted = frozenset((name, *spec.groups[name].within))
                    if here == wanted:
                        reads = (tensor, dim) in spec.reads
                        found[name].append(Place(name, module, reads, piece, length(factors), wanted))
    chosen = []
    for seen in found.values():
        inputs = [place for place in seen if place.reads]
        chosen += inputs or seen
    return chosen


def observe(
    models: Sequence[nn.Module], spec: Spec, batches: Iterable[Batch], *, whole: bool = True
) -> dict[str, Tensor]:
    """By group, the correlation of (models · units) over all batches, for `align` and `zip_models`.

    Without `whole`, only the first model's units are correlated with all, which is what `align` takes: a small part of
    the memory. A group seen at several places has the mean of their correlations, one vote a place. Positions that an
    `attention_mask` hides are left out. Every model sees the same batches; one batch of activations is held at a time.
    Raises MergeError for activations that are not finite and for an empty calibration set.
    """
    chosen = places(models[0], spec)
    gathered: dict[tuple[str, int], Activations] = {}
    with torch.inference_mode():
        for batch in batches:
            seen = [_watch(model, chosen, batch) for model in models]
            for key in seen[0]:
                if any(key not in other for other in seen):
                    raise MergeError("is seen in one model only", where=key[0], mend="align models of one architecture")
                rows = None if whole else len(seen[0][key])
                gathered.setdefault(key, Activations(rows)).add(torch.cat([one[key] for one in seen]))
    if chosen and not gathered:
        raise MergeError("the calibration set is empty", mend="give a few hundred rows")
    correlations: dict[str, Tensor] = {}
    seen_at = Counter(group for group, _ in gathered)
    for key in list(gathered):
        found = gathered.pop(key).correlation().div_(seen_at[key[0]])
        correlations[key[0]] = correlations[key[0]] + found if key[0] in correlations else found
    return correlations


def _takes_units_in(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups == 1
    # transformers' Conv1D is a linear layer that stores its weight the other way around.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _watch(model: nn.Module, chosen: Sequence[Place], batch: Batch) -> dict[tuple[str, int], Tensor]:
    """One forward: the activations of each place as (units, samples), keyed by group and order of appearance."""
    found: dict[tuple[str, int], Tensor] = {}
    taken: dict[str, list[Tensor]] = {}
    args, kwargs = (batch, {}) if isinstance(batch, tuple) else ((), dict(batch))
    mask = kwargs.get("attention_mask")

    def keep(place: Place, module: nn.Module, value: Any) -> None:
        known = taken.setdefault(place.group, [])
        # Queries, keys and values read one and the same tensor: it has one vote.
        if isinstance(value, Tensor) and not any(value is other for other in known):
            known.append(value)
            axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else value.ndim - 1
            found[place.group, len(known) - 1] = _units(value, axis, place, mask)

    handles = []
    for place in chosen:
        module = model.get_submodule(place.module)
        if place.reads:
            handles.append(module.register_forward_pre_hook(lambda m, inputs, p=place: keep(p, m, inputs[0])))
        else:
            handles.append(module.register_forward_hook(lambda m, _, output, p=place: keep(p, m, output)))
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _units(value: Tensor, axis: int, place: Place, mask: Tensor | None) -> Tensor:
    if mask is not None and axis == 2 and value.shape[:2] == mask.shape:
        value, axis = value[mask.bool()], 1
    if value.shape[axis] != place.length:
        raise MergeError(
            f"{value.shape[axis]} units are seen, the symmetry spec says {place.length}",
            where=place.module,
            mend="derive the spec from this model's own config",
        )
    apart, front = split(value, axis, place.piece, place.wanted)
    rest = [dim for dim in range(apart.ndim) if dim not in front]
    units = math.prod(apart.shape[dim] for dim in front)
    return apart.permute(*front, *rest).reshape(units, -1)
