"""One alignment: check symmetries, collect activations once, match units, and check the result on the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modelweld.alignment.models import AlignedModel, check_model, load
from modelweld.alignment.rows import Calibration, calibration_of, call_of
from modelweld.alignment.scoring import Scorer
from modelweld.alignment.unit_similarity import unit_similarity
from modelweld.config.align import Align
from modelweld.engine import Inputs, Plan
from modelweld.errors import ConfigError, MergeError
from modelweld.formats.alignment import CalibrationRows, ShownSimilarity
from modelweld.symmetry import Alignment, Spec, Zipped, align, zip_models
from modelweld.symmetry.instances import example_inputs
from modelweld.symmetry.invariance import TOLERANCE, output_error
from modelweld.symmetry.observing import observe
from modelweld.symmetry.view import Stored


@dataclass(frozen=True)
class Found:
    """The assignment of units, the alpha that was used, the scores of all values tried, and numerical errors.

    `stood_in`: the curve is that of the mean, because the recipe's method takes too long to be tried. `similarity`
    holds some groups' similarities before and after.
    """

    placement: Alignment | Zipped
    alpha: float
    curve: Mapping[float, float] | None
    stood_in: bool
    calibration: CalibrationRows | None
    invariance_errors: Mapping[str, float]
    preserved: Mapping[str, float]
    similarity: Sequence[ShownSimilarity]


def search(
    settings: Align, plan: Plan, common: Spec, models: Sequence[AlignedModel], inputs: Inputs, scratch: Path
) -> Found:
    """The alignment of `models`. Models that run on calibration rows are in memory together, others one by one.

    Sums over the rows are stored in `scratch` until the units are matched. Raises ConfigError for rows that the
    settings need and do not name, MergeError for a symmetry that does not hold.
    """
    wants = _wants_activations(settings)
    calibration = calibration_of(settings, inputs) if wants else None
    modules: list[nn.Module] = []
    checked: dict[str, float] = {}
    for model in models:
        module = load(model, inputs)
        checked[model.label] = check_model(module, model)
        if calibration is not None:
            modules.append(module)
        del module
    activations = _observed(settings, models, modules, calibration, scratch) if calibration is not None else {}
    if settings.alpha != "auto":
        # Only a search for alpha runs them again.
        modules.clear()
    match = _matcher(settings, common, models, activations)
    curve, stood_in = None, False
    if settings.alpha == "auto" and calibration is not None:
        scorer = Scorer(settings, plan, models, modules, inputs, calibration)
        curve, stood_in = scorer.curve(match), scorer.stood_in
        alpha = max(curve, key=lambda value: (curve[value], -abs(value - 0.5)))
    elif settings.space == "activations":
        alpha = 0.0
    else:
        alpha = settings.alpha if wants and settings.alpha != "auto" else 1.0
    placement = match(alpha)
    shown = unit_similarity(common, models, activations, alpha, placement) if isinstance(placement, Alignment) else []
    del modules, activations, match
    preserved = _preserved(placement, models, inputs) if isinstance(placement, Alignment) else {}
    record = calibration.record if calibration else None
    return Found(placement, alpha, curve, stood_in, record, checked, preserved, shown)


def _wants_activations(settings: Align) -> bool:
    wants = settings.space != "weights" and bool(settings.calibration)
    if not wants and settings.space in ("dual", "activations"):
        raise ConfigError(
            f"space: {settings.space} needs rows to run the models on", where="align.calibration", hint="name them"
        )
    if not wants and settings.alpha == "auto":
        raise ConfigError(
            "alpha: auto weighs weights against activations, and there are no calibration rows",
            where="align.calibration",
            hint="calibration: {name: {dataset: …}}",
        )
    return wants


def _matcher(
    settings: Align, common: Spec, models: Sequence[AlignedModel], activations: Mapping[str, Tensor]
) -> Callable[[float], Alignment | Zipped]:
    states = [Stored(model.checkpoint, model.names) for model in models]
    options: dict[str, Any] = {"seed": settings.seed, "patience": settings.patience, "sweeps": settings.sweeps}
    if settings.mode == "align":
        return lambda alpha: align(states, common, activations, alpha, **options)
    zipped = partial(zip_models, beta=settings.beta, budget=settings.budget)
    return lambda alpha: zipped(states, common, activations, alpha, **options)


def _observed(
    settings: Align,
    models: Sequence[AlignedModel],
    modules: Sequence[nn.Module],
    calibration: Calibration,
    scratch: Path,
) -> Mapping[str, Tensor]:
    first = models[0]
    for model, module in zip(models, modules, strict=True):
        if type(module) is not type(modules[0]):
            raise MergeError(
                f"{model.label} is a {type(module).__name__}, {first.label} a {type(modules[0]).__name__}",
                where="align",
                hint="align by weights alone: space: weights",
            )
    calls = [call_of(modules[0], batch) for batch in calibration.batches]
    return observe(modules, first.module_spec, calls, whole=settings.mode == "zip", scratch=scratch)


def _preserved(found: Alignment, models: Sequence[AlignedModel], inputs: Inputs) -> dict[str, float]:
    """By model, the relative output error under the permutations that were found; MergeError if it is too large."""
    preserved = {}
    for model, permutations in zip(models, found.permutations, strict=True):
        module = load(model, inputs)
        error = output_error(module, model.module_spec, example_inputs(module), permutations)
        preserved[model.label] = error
        if error >= TOLERANCE:
            raise MergeError(
                f"its alignment changes what it computes by {error:.1e}", where=model.label, hint="report this"
            )
    return preserved
