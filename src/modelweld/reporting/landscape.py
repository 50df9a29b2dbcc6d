"""The plane through two experts and their merge: how well each task is answered at every point of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from modelweld.reporting.plots import FAINT, FIXED, INK, _figure, _save, _title


def plot_landscape(plane: Mapping[str, Any], tasks: Sequence[str], out: Path) -> Path:
    """Write a PNG with one panel a task: contours of accuracy, and where the experts and the merge lie.

    `plane` has `x` and `y` (distances in weight space), `tasks` (tasks, y, x) accuracies and `points` by name.
    """
    values = np.asarray(plane["tasks"], dtype=float)
    levels = np.linspace(0.0, 1.0, 11)
    figure = _figure(0.8 + 3.9 * len(tasks), 3.9)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task, accuracies in zip(panels, tasks, values, strict=True):
        filled = axes.contourf(plane["x"], plane["y"], accuracies, levels=levels, cmap="Blues", alpha=0.9)
        axes.contour(plane["x"], plane["y"], accuracies, levels=levels[::2], colors="white", linewidths=0.7)
        for name, (x, y) in plane["points"].items():
            axes.plot(x, y, "o", color=FIXED["merged"] if name == "merge" else INK, markeredgecolor="white")
            axes.annotate(
                name, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8.5, color=INK,
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            )  # fmt: skip
        axes.set_title(f"accuracy on {task}", **_title())
        axes.set_xlabel("distance in weight space", fontsize=9, color=FAINT)
        axes.tick_params(colors=FAINT, labelsize=8)
    scale = figure.colorbar(filled, ax=panels.tolist(), format=PercentFormatter(1.0), shrink=0.9)
    scale.ax.tick_params(colors=FAINT, labelsize=8)
    return _save(figure, out)
