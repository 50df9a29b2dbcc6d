"""Plots of a scoreboard and of what happened to each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from modelweld.formats.scores import Scoreboard, Summary
from modelweld.reporting.layers import LayerSeries
from modelweld.reporting.wording import metric_name

INK, FAINT, GRID = "#1f2933", "#6b7785", "#e3e7ec"
FIXED = {"base": "#c3cad3", "expert": "#3d4b5c", "merged": "#d9480f"}
# Baselines: blues to greens, apart in lightness too, so that they stay apart in print and for colour-blind eyes.
SERIES = ("#a5c8ec", "#5b9bd5", "#2b6cb0", "#1a4971", "#8fd3c1", "#3aa58b", "#1d6b59")


def plot_scores(scoreboard: Scoreboard, out: Path) -> Path:
    """Write a PNG: every system's score on every task with its interval, and the mean and worst share of the expert."""
    board = scoreboard.summary()
    systems, tasks = board.order, list(board.tasks)
    width = 3.9 + max(5.0, 0.17 * len(tasks) * (len(systems) + 1.6))
    figure = _figure(width, 1.9 + max(2.9, 0.36 * len(systems)))
    bars, shares = figure.subplots(1, 2, width_ratios=(width - 3.9, 3.9))
    _bars(bars, board, systems, tasks)
    _shares(shares, board, systems)
    handles, labels = bars.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(systems), 8), frameon=False, fontsize=9)
    return _save(figure, out)


def plot_layers(series: Sequence[LayerSeries], out: Path) -> Path:
    """Write a PNG with one panel a figure (delta survival, sign conflicts, kept share), by layer."""
    figure = _figure(8.6, 0.4 + 2.3 * len(series))
    panels = figure.subplots(len(series), 1, squeeze=False)[:, 0]
    for axes, one in zip(panels, series, strict=True):
        _layers(axes, one)
    return _save(figure, out)


def colours(systems: Sequence[str]) -> dict[str, str]:
    """A colour for each system; base, expert and merged always have the same."""
    others = [name for name in systems if name not in FIXED]
    return FIXED | {name: SERIES[index % len(SERIES)] for index, name in enumerate(others)}


def _bars(axes: Axes, board: Summary, systems: Sequence[str], tasks: Sequence[str]) -> None:
    palette = colours(systems)
    step = 0.84 / len(systems)
    places = np.arange(len(tasks))
    for index, system in enumerate(systems):
        intervals = [board.systems[system].tasks[task].score for task in tasks]
        values = np.array([interval.value for interval in intervals])
        low = np.array([interval.value if interval.low is None else interval.low for interval in intervals])
        high = np.array([interval.value if interval.high is None else interval.high for interval in intervals])
        axes.bar(
            places + (index - (len(systems) - 1) / 2) * step,
            values,
            width=step * 0.92,
            color=palette[system],
            label=system,
            # A percentile interval need not hold the value itself; an error bar may not be negative.
            yerr=np.clip([values - low, high - values], 0, None),
            error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 1.6, "capthick": 0.9},
            zorder=2,
        )
    confidence = next(iter(board.tasks.values())).confidence
    axes.set_title(f"{metric_name(board.metric)} by task, {100 * confidence:g} % intervals", **_title())
    axes.set_xticks(places, [f"{task}\nn = {board.tasks[task].rows:,}" for task in tasks])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlim(-0.55, len(tasks) - 0.45)
    _plain(axes, grid="y")
    axes.tick_params(axis="x", length=0, labelcolor=INK)


def _shares(axes: Axes, board: Summary, systems: Sequence[str]) -> None:
    palette = colours(systems)
    places = np.arange(len(systems))[::-1]
    means = [board.systems[system].mean_normalised for system in systems]
    worst = [board.systems[system].worst_normalised for system in systems]
    axes.barh(places, means, height=0.66, color=[palette[system] for system in systems], zorder=2)
    axes.plot(
        worst, places, "D", color="white", markeredgecolor=INK, markeredgewidth=0.9, markersize=5, zorder=4, ls="none"
    )
    axes.axvline(1.0, color=FAINT, linewidth=0.9, linestyle=(0, (3, 2)), zorder=3)
    limit = max(1.0, *means)
    for place, mean in zip(places, means, strict=True):
        axes.text(limit * 1.045, place, f"{mean:.3f}", va="center", ha="left", fontsize=9, color=INK)
    axes.set_xlim(0, limit * 1.24)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.set_yticks(places, systems)
    axes.set_title("share of the expert's: mean, ◇ worst task", **_title())
    _plain(axes, grid="x")
    axes.tick_params(axis="y", length=0, labelcolor=INK)


def _layers(axes: Axes, series: LayerSeries) -> None:
    places = np.arange(len(series.groups))
    low, high = np.array(series.low), np.array(series.high)
    axes.vlines(places, low, high, color="#f4b393", linewidth=7, zorder=2)
    axes.plot(places, series.mean, color=FIXED["merged"], marker="o", markersize=4.5, linewidth=1.3, zorder=3)
    axes.set_title(series.title, **_title())
    crowded = len(series.groups) > 16
    axes.set_xticks(places, series.groups, rotation=45 if crowded else 0, ha="right" if crowded else "center")
    # Rounding to float32 loses nothing one can see: without a least span the axis would show its noise.
    middle, half = (low.min() + high.max()) / 2, max((high.max() - low.min()) * 0.6, 0.01)
    axes.set_ylim(middle - half, middle + half)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(-0.5, len(series.groups) - 0.5)
    _plain(axes, grid="y")


def _figure(width: float, height: float) -> Figure:
    """A figure of its own: pyplot's global state would outlive the call."""
    layout = ConstrainedLayoutEngine(hspace=0.12)
    figure = Figure(figsize=(width, height), dpi=160, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _title() -> dict[str, Any]:
    return {"loc": "left", "fontsize": 10.5, "color": INK, "pad": 10}


def _plain(axes: Axes, grid: str) -> None:
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    axes.grid(axis="y" if grid == "y" else "x", color=GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=9, length=0 if grid == "y" else 3)


def _save(figure: Figure, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    # Without metadata equal scores give equal files.
    figure.savefig(out, format="png", metadata={"Software": None})
    return out
