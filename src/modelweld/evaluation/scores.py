"""The scoreboard of a project, from its scores files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from modelweld.errors import InputError
from modelweld.formats.scores import Scoreboard, TaskScores


def scoreboard(root: Path, tasks: Iterable[str] | None = None) -> Scoreboard:
    """Every task's scores below `root` (a project, or its scores/ folder), or those of `tasks`.

    InputError when there are none, when tasks were scored by different metrics, or when a system is missing in one.
    """
    folder = root / "scores" if (root / "scores").is_dir() else root
    names = sorted(path.stem for path in folder.glob("*.json")) if tasks is None else list(tasks)
    found = {name: TaskScores.read(folder / f"{name}.json") for name in names}
    if not found:
        raise InputError("no scores here", where=str(folder), hint="`dvc repro` or `modelweld run` makes them")
    metrics = {scores.metric for scores in found.values()}
    if len(metrics) > 1:
        raise InputError(
            f"tasks scored by different metrics: {', '.join(sorted(metrics))}",
            where=str(folder),
            hint="`dvc repro` scores them all by `evaluate.metric`",
        )
    everything = set().union(*(scores.systems for scores in found.values()))
    for name, scores in found.items():
        if missing := everything.difference(scores.systems):
            raise InputError(
                f"no scores of {', '.join(sorted(missing))}, which other tasks have",
                where=str(folder / f"{name}.json"),
                hint="`dvc repro` scores every system on every task; delete the scores of tasks that no longer exist",
            )
    return Scoreboard(metrics.pop(), found)
