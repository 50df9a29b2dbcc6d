"""The manifest's per-tensor figures, gathered by layer."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from modelweld.formats.manifest import MergedTensor

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
FIGURES = {
    "delta_survival": "delta survival: share of the merged change that rounding left",
    "sign_conflicts": "sign conflicts: share of the kept entries whose sign lost the election",
    "kept_share": "kept share: entries of the task vectors that pruning left",
    "interference": "interference: share of the objective that the merge leaves, 1 without a merge",
}


@dataclass(frozen=True)
class LayerSeries:
    """One figure by layer: the mean over the layer's tensors, and its least and largest."""

    title: str
    groups: tuple[str, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def layer_series(tensors: Mapping[str, MergedTensor]) -> list[LayerSeries]:
    """One series for every figure that some tensor has; layers in their order, the rest around them.

    Tensors without a figure (copied ones, or a method that has none) are left out of its mean.
    """
    found = []
    for key, title in FIGURES.items():
        values: dict[tuple[int, int, str], list[float]] = defaultdict(list)
        for name, entry in tensors.items():
            value = entry.figure(key)
            if isinstance(value, int | float) and math.isfinite(value):
                values[_group(name)].append(float(value))
        if values:
            order = sorted(values)
            found.append(
                LayerSeries(
                    title=title,
                    groups=tuple(group[2] for group in order),
                    mean=tuple(sum(values[group]) / len(values[group]) for group in order),
                    low=tuple(min(values[group]) for group in order),
                    high=tuple(max(values[group]) for group in order),
                )
            )
    return found


def _group(name: str) -> tuple[int, int, str]:
    """Sort key and label: embeddings before the layers, what comes after them behind."""
    if layer := _LAYER.search(name):
        return 1, int(layer[1]), layer[1]
    component = name.split(".", 1)[0]
    return (0 if re.search(r"emb|wte|wpe|shared", name) else 2), 0, component
