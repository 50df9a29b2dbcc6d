"""From a plan's inputs to the same inputs with all units in one order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from modelweld.alignment.models import AlignedModel, base_model, models_of, moves
from modelweld.alignment.record import Aligned, assignments_of, identity_alignment, note_of, record_of, with_warnings
from modelweld.alignment.search import search
from modelweld.alignment.specs import CACHE
from modelweld.alignment.views import placed_inputs
from modelweld.checkpoints.shards import disk_errors
from modelweld.config import Recipe
from modelweld.config.align import Align
from modelweld.engine import Inputs, Plan
from modelweld.errors import ConfigError, MergeError
from modelweld.methods.registry import method
from modelweld.symmetry import Spec


def align_inputs(recipe: Recipe, plan: Plan, inputs: Inputs, root: Path) -> Aligned:
    """The inputs of a plan with all units in one order; specs are cached below `root`.

    The common order is the first expert's, or the base's if the plan reads the base. Raises MergeError for models that
    cannot be aligned, a symmetry that does not hold, and calibration rows that are insufficient; InputError for rows
    that cannot be read.
    """
    settings = recipe.alignment
    if settings is None:
        raise ConfigError("the recipe asks for no alignment", where="align", hint="align: {}")
    if settings.mode == "none":
        found = identity_alignment(settings, inputs, "every unit stays where it is: align.mode is none")
    elif inputs.experts and all(expert.adapter is not None for expert in inputs.experts):
        why = "all experts are adapters of one base and keep its units: they are aligned already, nothing is permuted"
        found = identity_alignment(settings, inputs, why)
    else:
        found = _matched(recipe, settings, plan, inputs, root)
    return with_warnings(found, settings, plan)


def _matched(recipe: Recipe, settings: Align, plan: Plan, inputs: Inputs, root: Path) -> Aligned:
    common, models = models_for(recipe, settings, plan, inputs, root)
    with _scratch(root) as scratch:
        found = search(settings, plan, common, models, inputs, scratch)
    record = record_of(settings, recipe.method_name, common, models, found)
    views = placed_inputs(inputs, models, found.placement.placed)
    return Aligned(views, record, assignments_of(models, found), (note_of(record),))


def models_for(
    recipe: Recipe, settings: Align, plan: Plan, inputs: Inputs, root: Path
) -> tuple[Spec, Sequence[AlignedModel]]:
    """The common spec and the models that are matched: the experts, preceded by the base if the plan reads it.

    Raises MergeError for a single model, for models that cannot be aligned, and for a zip with a method that reads the
    base.
    """
    if len(inputs.experts) < 2:
        raise MergeError("alignment takes two models or more", where="models", hint="name another one")
    common, experts = models_of(settings, inputs, root)
    if not _reads_base(plan, inputs, frozenset(name for name, axes in common.axes.items() if moves(axes))):
        return common, experts
    if settings.mode == "zip":
        raise MergeError(
            f"zip merges units across models, and {recipe.method_name} (or a rule) reads the base",
            where="align.mode",
            hint="use mode: align, or a method that needs no base",
        )
    return common, [base_model(inputs, common, experts[0]), *experts]


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A temporary folder for the search's sums: next to the other caches, since it can be large."""
    home = root / CACHE.parts[0]
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        made = TemporaryDirectory(prefix="align-", dir=home)
    with made as name:
        yield Path(name)


def _reads_base(plan: Plan, inputs: Inputs, moved: frozenset[str]) -> bool:
    if inputs.base is None:
        return False
    for tensor in plan.tensors:
        if tensor.name not in moved:
            continue
        chosen = method(tensor.parameters.method) if tensor.parameters else None
        if chosen is None or chosen.needs_base or chosen.whole_matrix:
            return True
    return False
