"""A grid of merges: one candidate per combination of parameters, from one reading of the models.

What does not depend on the parameters is done once per weight (DRM's factorisation above all), and tensors that two
candidates make alike are made once. Each candidate is byte for byte what `merge` would have written.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelweld.checkpoints.shards import disk_errors
from modelweld.config import Recipe
from modelweld.config.loading import check_recipe
from modelweld.engine import (
    Progress,
    build,
    execute_together,
    open_inputs,
    place,
    publish,
    require_replaceable,
    staged,
)
from modelweld.errors import ConfigError
from modelweld.formats.manifest import FILE
from modelweld.lineage import manifest, model_card
from modelweld.stages.merge import MergeReport, report_of

Grid = Mapping[str, Sequence[Any]]


def merge_grid(
    recipe: Recipe,
    grid: Grid,
    out: str | Path,
    device: str = "auto",
    *,
    executor: str = "local",
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, MergeReport]:
    """Weld every combination of the grid's values into `<out>/<key>/`; the reports by key (`drop_rate=0.5_scale=1`).

    Raises ConfigError for an axis that is no parameter of the recipe's method, and what `merge` raises.

        merge_grid(load_recipe(Path("recipe.yaml")), {"drop_rate": [0.5, 0.8, 0.9]}, "candidates")
    """
    if recipe.alignment is not None:
        raise ConfigError(
            "a grid does not align its experts", where="align", hint="merge one combination at a time, without --grid"
        )
    recipes = candidates(recipe, grid)
    root = Path(out)
    for key in recipes:
        require_replaceable(root / key)
    placement, started = place(device, executor), time.perf_counter()
    reports: dict[str, MergeReport] = {}
    with open_inputs(recipe) as inputs, contextlib.ExitStack() as stack:
        plans = {key: build(candidate, inputs) for key, candidate in recipes.items()}
        planned = time.perf_counter()
        root.mkdir(parents=True, exist_ok=True)
        places = {key: stack.enter_context(staged(root / key, plan.key)) for key, plan in plans.items()}
        executions = execute_together(
            [(plans[key], places[key]) for key in recipes],
            inputs,
            placement=placement,
            threads=threads,
            memory_limit=memory_limit,
            progress=progress,
        )
        for (key, candidate), execution in zip(recipes.items(), executions, strict=True):
            executed, tree = time.perf_counter(), places[key] / "tree"
            written = manifest.build(candidate, plans[key], inputs, execution, tree, device=placement.kind)
            with disk_errors(tree / FILE):
                written.write(tree / FILE)
            (tree / "README.md").write_text(model_card.render(written), encoding="utf-8")
            publish(places[key], root / key)
            # Planning and merging were shared: every report shows them whole.
            seconds = {"plan": planned - started, **execution.seconds, "manifest": time.perf_counter() - executed}
            reports[key] = report_of(root / key, candidate, plans[key], execution, written, seconds)
    return reports


def candidates(recipe: Recipe, grid: Grid) -> dict[str, Recipe]:
    """The recipe of every combination, by its key, in the order of the grid."""
    known = [name for name in type(recipe.parameters()).model_fields if name != "method"]
    for axis, values in grid.items():
        if axis not in known:
            close = difflib.get_close_matches(axis, known, n=1)
            raise ConfigError(
                f"{recipe.method_name} has no parameter {axis!r}",
                where="grid",
                hint=f"did you mean {close[0]!r}?" if close else f"one of {', '.join(known)}",
            )
        if not values or len({str(value) for value in values}) != len(values):
            raise ConfigError(f"{axis} has no values, or one twice: {values}", where="grid")
    if not grid:
        raise ConfigError("no axis to vary", where="grid", hint="--grid drop_rate=0.5,0.8,0.9")
    found = {}
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        key = "_".join(f"{axis}={value}" for axis, value in chosen.items())
        found[key] = check_recipe(recipe.model_dump() | chosen, where=f"--grid, {key}")
    return found
