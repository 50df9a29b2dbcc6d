"""What an alignment did: the search for alpha, the similarity of units before and after, how many units moved."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from modelweld.formats.alignment import AlignmentRecord
from modelweld.reporting.plots import FAINT, FIXED, SERIES, _figure, _plain, _save, _title

# Numbers in a tensor's name say which layer it is in; "0.1" in brackets are axes.
_NUMBERS = re.compile(r"(?<![\w\[])\d+(?=\.)")
_MOST_LABELS = 8


def alignment_plots(record: AlignmentRecord, out: Path) -> dict[str, Path]:
    """Every plot that an alignment.json has figures for, in the folder `out`: `alpha`, `identity`, `similarity 1` …"""
    plots = {}
    if record.alpha_curve:
        curve = {float(alpha): score for alpha, score in record.alpha_curve.items()}
        plots["alpha"] = plot_alpha({f"merged by {record.alpha_scored_by}": curve}, out / "alpha.png")
    if record.groups:
        shares = {name: group.identity_share for name, group in record.groups.items()}
        plots["identity"] = plot_identity(shares, out / "identity.png")
    for number, shown in enumerate(record.similarity, 1):
        plots[f"similarity {number}"] = plot_similarity(
            np.array(shown.before),
            np.array(shown.after),
            f"{shown.group}, {shown.models[0]} (rows) and {shown.models[1]}",
            out / f"similarity-{number}.png",
            (shown.matched.before, shown.matched.after),
        )
    return plots


def plot_alpha(curves: Mapping[str, Mapping[float, float]], out: Path) -> Path:
    """Write a PNG of the score on the validation slice by alpha, a line a search; a ring marks each best."""
    figure = _figure(6.4, 3.4)
    axes = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        colour = (FIXED["merged"], *SERIES[1::2])[index % 5]
        alphas, values = list(curve), list(curve.values())
        axes.plot(alphas, values, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=name)
        best = int(np.argmax(values))
        axes.plot(alphas[best], values[best], "o", markersize=10, markerfacecolor="none", markeredgecolor=colour)
    axes.set_title("accuracy on the validation slice by α", **_title())
    axes.set_xlabel("α: 0 activations alone, 1 weights alone", fontsize=9, color=FAINT)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=9)
    _plain(axes, grid="y")
    return _save(figure, out)


def plot_similarity(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    group: str,
    out: Path,
    matched: tuple[float, float] | None = None,
) -> Path:
    """Write a PNG: one group's similarity of model 0's units (rows) to another's, in its own order and aligned.

    `matched` are the mean similarities of counterparts where the matrices show only some of the units.
    """
    figure = _figure(8.6, 4.1)
    panels = figure.subplots(1, 2)
    most = max(float(np.abs(before).max()), float(np.abs(after).max()), 1e-9)
    means = matched or (float(np.diag(before).mean()), float(np.diag(after).mean()))
    named = zip(panels, (before, after), ("before", "after alignment"), means, strict=True)
    for axes, matrix, title, mean in named:
        drawn = axes.imshow(matrix, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        axes.set_title(f"{title}: mean of matched {mean:.2f}", **_title())
        axes.tick_params(colors=FAINT, labelsize=8)
    figure.colorbar(drawn, ax=panels.tolist(), shrink=0.85).ax.tick_params(colors=FAINT, labelsize=8)
    figure.suptitle(group, fontsize=9, color=FAINT)
    return _save(figure, out)


def identity_by_layer(shares: Mapping[str, float]) -> dict[str, float]:
    """The mean identity share of the groups of each layer, in the order of the model; the rest by their component."""
    found: dict[str, list[float]] = defaultdict(list)
    for group, share in shares.items():
        numbers = _NUMBERS.findall(group)
        # A group is named by an axis of a tensor: "embeddings.word.weight[1]" belongs to the component "word".
        parts = group.partition("[")[0].split(".")
        found[".".join(numbers) if numbers else parts[-min(2, len(parts))]].append(share)
    return {layer: float(np.mean(values)) for layer, values in found.items()}


def plot_identity(shares: Mapping[str, float], out: Path) -> Path:
    """Write a PNG of the share of units that stay where they are, by layer: 1 throughout means nothing to align."""
    layers = identity_by_layer(shares)
    figure = _figure(max(5.0, 1.4 + 0.32 * len(layers)), 3.2)
    axes = figure.subplots()
    places = np.arange(len(layers))
    axes.bar(places, list(layers.values()), color=FIXED["merged"], width=0.7, zorder=2)
    axes.set_ylim(0, 1)
    crowded = len(layers) > _MOST_LABELS
    axes.set_xticks(places, list(layers), rotation=45 if crowded else 0, ha="right" if crowded else "center")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("units that stay in place, by layer", **_title())
    _plain(axes, grid="y")
    return _save(figure, out)
