"""Three models that span a plane in weight space, and the models that lie on it.

The corners are two experts and their merge. The merge is in the common order of units, the second expert in its own:
between them lies the loss barrier that alignment removes. Heads are permuted with their backbone: at either expert both
heads are in that expert's own order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from modelweld.alignment.models import BASE, models_of
from modelweld.alignment.record import ASSIGNMENTS
from modelweld.checkpoints import Checkpoint
from modelweld.config.align import Align
from modelweld.engine import Inputs
from modelweld.engine.plan.inputs import Expert
from modelweld.errors import ConfigError, InputError
from modelweld.formats.alignment import FILE, AlignmentRecord
from modelweld.symmetry import Permutations, Spec
from modelweld.symmetry.families import STATISTICS

MERGE = "merge"
NOTHING = Spec({}, {})
_ON_THE_LINE = 1e-3


@dataclass(frozen=True)
class Order:
    """The common order of a merge for two experts: each one's spec and permutations."""

    specs: tuple[Spec, Spec]
    permutations: tuple[Permutations, Permutations]

    @classmethod
    def of(cls, settings: Align, inputs: Inputs, merged: Path, root: Path) -> Order:
        """What alignment.json of a merged directory says; ConfigError for zip, whose units are no expert's."""
        record = AlignmentRecord.read_if_present(merged / FILE)
        if record is not None and record.mode == "zip":
            raise ConfigError(
                "no permutation leads from an expert to a zipped merge", where="align.mode", hint="use mode: align"
            )
        if record is None or not record.groups:
            return cls((NOTHING, NOTHING), ({}, {}))
        one, other = models_of(settings, inputs, root)[1][:2]
        stored = load_file(merged / ASSIGNMENTS)
        found = [{group: stored[f"{model.label}/{group}"].long() for group in record.groups} for model in (one, other)]
        return cls((one.spec, other.spec), (found[0], found[1]))

    def common(self, expert: int, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the first (0) or second (1) expert in the common order."""
        return self.specs[expert].apply_to(name, tensor, self.permutations[expert])

    def as_second(self, expert: int, name: str, tensor: Tensor) -> Tensor:
        """A tensor that is in the common order, in that of the second expert's own units."""
        return self.specs[expert].apply_to(name, tensor, self.specs[1].invert(self.permutations[1]))


@dataclass(frozen=True)
class Corner:
    """A backbone by the merge's names, and the heads of both experts in its order of units, by the experts' names."""

    name: str
    backbone: Mapping[str, Tensor]
    heads: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]

    def away(self, origin: Corner, name: str) -> Tensor:
        """One tensor's difference, flat, in float64."""
        return (self.backbone[name].double() - origin.backbone[name].double()).flatten()  # (elements,)


@dataclass(frozen=True)
class Plane:
    """`right` is the second corner's distance from the first; the third lies `over` to the right and `up`."""

    corners: tuple[Corner, Corner, Corner]
    right: float
    over: float
    up: float
    points: Mapping[str, tuple[float, float]]

    @classmethod
    def through(cls, first: Corner, second: Corner, merge: Corner, base: Corner | None) -> Plane:
        """The plane of two experts and their merge, or with the base where the merge lies on the line between them.

        InputError where these span none.
        """
        points = {first.name: (0.0, 0.0)}
        for third in (merge, base):
            if third is None:
                continue
            right, over, up = _triangle(first, second, third)
            if up > _ON_THE_LINE * right > 0.0:
                points |= {second.name: (right, 0.0), third.name: (over, up)}
                if third is not merge:
                    points[MERGE] = _coordinates(merge, first, second, third, (right, over, up))
                return cls((first, second, third), right, over, up, points)
        raise InputError(
            "the merge lies on the line between the experts: three models on a line span no plane",
            where=MERGE,
            hint="name the base that they were finetuned from: it is taken as the third point",
        )

    def at(self, across: float, height: float, expert: int, names: Mapping[str, str]) -> dict[str, Tensor]:
        """The model at a point with the head of an expert on, by that expert's names."""
        third = height / self.up
        second = (across - third * self.over) / self.right
        shares = (1.0 - second - third, second, third)

        def mixed(parts: Sequence[Tensor]) -> Tensor:
            a, b, c = (part * share for part, share in zip(parts, shares, strict=True))
            return a.add_(b).add_(c)

        state = {names[name]: mixed([one.backbone[name] for one in self.corners]) for name in self.corners[0].backbone}
        heads = [one.heads[expert] for one in self.corners]
        return state | {name: mixed([head[name] for head in heads]) for name in heads[0]}


def corners_of(inputs: Inputs, order: Order, merged: Checkpoint) -> tuple[Corner, Corner, Corner, Corner | None]:
    """The first two experts, their merge, and the base where there is one, in float32."""
    experts = inputs.experts[:2]
    names = [
        name
        for name, info in merged.tensors.items()
        if info.dtype.is_floating_point and all(name in one.name_map.names for one in experts)
    ]
    stored = [expert.name_map.names for expert in experts]
    heads = [_head(order, number, expert) for number, expert in enumerate(experts)]
    theirs = [{name: order.as_second(k, name, tensor) for name, tensor in heads[k].items()} for k in (0, 1)]
    common, own = (heads[0], heads[1]), (theirs[0], theirs[1])
    first = {n: order.common(0, stored[0][n], experts[0].checkpoint.read(stored[0][n]).float()) for n in names}
    second = {n: experts[1].checkpoint.read(stored[1][n]).float() for n in names}
    base = None
    if inputs.base is not None:
        base = Corner(BASE, {n: inputs.base.read(n).float() for n in names}, common)
    merge = Corner(MERGE, {n: merged.read(n).float() for n in names}, common)
    return Corner(experts[0].label, first, common), Corner(experts[1].label, second, own), merge, base


def _head(order: Order, number: int, expert: Expert) -> dict[str, Tensor]:
    """An expert's head in the common order."""
    floating = [n for n in expert.name_map.head if expert.checkpoint.tensors[n].dtype.is_floating_point]
    return {name: order.common(number, name, expert.checkpoint.read(name).float()) for name in floating}


def _triangle(first: Corner, second: Corner, third: Corner) -> tuple[float, float, float]:
    """The second corner's distance from the first, and the third's coordinates along and off that line."""
    right = math.sqrt(_product(second, second, first))
    if right == 0.0:
        return 0.0, 0.0, 0.0
    over = _product(second, third, first) / right
    return right, over, math.sqrt(max(_product(third, third, first) - over**2, 0.0))


def _coordinates(
    point: Corner, first: Corner, second: Corner, third: Corner, triangle: tuple[float, float, float]
) -> tuple[float, float]:
    """Where a model lies on the plane, or what of it does."""
    right, over, up = triangle
    across = _product(second, point, first) / right
    return across, (_product(third, point, first) - over * across) / up


def _product(one: Corner, other: Corner, origin: Corner) -> float:
    """The inner product of two differences from `origin`; batch statistics are no coordinates of weight space."""
    names = (name for name in origin.backbone if not name.endswith(STATISTICS))
    return sum(float(one.away(origin, name) @ other.away(origin, name)) for name in names)
