"""The loss landscape of a merge: accuracy by task on the plane through two experts and their merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modelweld.alignment.batch_statistics import recompute_statistics
from modelweld.alignment.models import model_of
from modelweld.alignment.plane import Order, Plane, corners_of
from modelweld.alignment.rows import Calibration, accuracy_on, calibration_of
from modelweld.checkpoints import Checkpoint
from modelweld.checkpoints.shards import disk_errors
from modelweld.config import Params, load_params, load_recipe_or_params
from modelweld.config.align import Align
from modelweld.engine import Inputs, open_inputs
from modelweld.engine.plan.inputs import Expert, task_of
from modelweld.errors import ConfigError, InputError
from modelweld.lineage import manifest
from modelweld.symmetry.families import STATISTICS
from modelweld.symmetry.instances import own_names

FILE = Path(".modelweld") / "landscape.json"
_CALIBRATION_ROWS = 128
_DIGITS = 4
# How much of the plane is shown, in parts of the distances that span it.
_ACROSS, _HEIGHT = (-0.25, 1.25), (-0.4, 1.6)


def landscape(params_file: Path, root: Path, *, steps: int = 9, rows: int = 200) -> dict[str, Any]:
    """Accuracies by task on `steps` × `steps` points of the plane, on up to `rows` validation rows per task.

    Stored in .modelweld/landscape.json. Raises ConfigError for a zipped merge and for experts without heads, InputError
    where the models span no plane, and what reading rows raises.
    """
    params, merged, recipe = load_params(params_file), root / "merged", load_recipe_or_params(params_file)
    asked = recipe.alignment or Align()
    settings = asked.model_copy(update={"rows": min(asked.rows, _CALIBRATION_ROWS), "validation_rows": rows})
    with ExitStack() as opened:
        inputs = opened.enter_context(open_inputs(recipe))
        if len(inputs.experts) < 2 or not all(expert.name_map.head for expert in inputs.experts[:2]):
            raise ConfigError("a landscape needs two experts with heads", where="merge.models", hint="name them")
        order = Order.of(settings, inputs, merged, root)
        plane = Plane.through(*corners_of(inputs, order, opened.enter_context(Checkpoint.open(merged))))
        trials = [_TaskScore(params, settings, expert, inputs, root) for expert in inputs.experts[:2]]
        xs = np.linspace(_ACROSS[0] * plane.right, _ACROSS[1] * plane.right, steps)
        ys = np.linspace(_HEIGHT[0] * plane.up, _HEIGHT[1] * plane.up, steps)
        values = np.zeros((2, steps, steps))
        with _progress(values.size) as advance:
            for number, trial in enumerate(trials):
                for row, column in np.ndindex(steps, steps):
                    values[number, row, column] = trial.score(plane, number, float(xs[column]), float(ys[row]))
                    advance()
    found = {
        "version": 1,
        "of": _identity(merged),
        "rows": rows,
        "x": xs.round(_DIGITS).tolist(),
        "y": ys.round(_DIGITS).tolist(),
        "points": {name: [round(coordinate, _DIGITS) for coordinate in point] for name, point in plane.points.items()},
        "tasks": {trial.task: value.round(_DIGITS).tolist() for trial, value in zip(trials, values, strict=True)},
    }
    with disk_errors(root / FILE):
        (root / FILE).parent.mkdir(exist_ok=True)
        (root / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def stored_landscape(root: Path) -> dict[str, Any] | None:
    """The landscape that was computed last; None when there is none, or only that of another merge."""
    try:
        document: dict[str, Any] = json.loads((root / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"is no landscape: {error}", where=str(root / FILE), hint="delete it") from error
    return document if document.get("of") == _identity(root / "merged") else None


def _identity(merged: Path) -> str:
    return manifest.read(merged).digest


class _TaskScore:
    """One expert's task: its model, and its validation rows to score points of the plane on."""

    def __init__(self, params: Params, settings: Align, expert: Expert, inputs: Inputs, root: Path) -> None:
        self.task = task_of(expert)
        if self.task not in params.tasks:
            raise ConfigError(f"no task {self.task!r} is known", where="tasks", hint="name its dataset in params.yaml")
        spec = params.tasks[self.task]
        rows = spec.rows(str(root / "datasets" / spec.dataset), "validation")
        limits = settings.model_copy(update={"max_length": spec.max_length})
        self._accuracy = accuracy_on(rows, limits, self.task, expert, inputs)
        self._names = expert.name_map.names
        self._model = model_of(expert.checkpoint)
        self._modules = own_names(self._model, expert.checkpoint.tensors)
        self._calibration = self._batches(settings, inputs)

    def score(self, plane: Plane, number: int, across: float, height: float) -> float:
        """The accuracy at a point, with batch statistics recomputed there."""
        state = plane.at(across, height, number, self._names)
        own = {self._modules[name]: tensor for name, tensor in state.items() if name in self._modules}
        self._model.load_state_dict(own, strict=False)
        if self._calibration is not None:
            recompute_statistics(self._model, self._calibration)
        return self._accuracy(self._model)

    def _batches(self, settings: Align, inputs: Inputs) -> Calibration | None:
        batched = any(name.endswith(STATISTICS) for name, _ in self._model.named_buffers())
        wanted = batched and settings.repair is not False and bool(settings.calibration)
        return calibration_of(settings, inputs) if wanted else None


@contextmanager
def _progress(points: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("landscape", total=points)
        yield lambda: progress.advance(bar)
