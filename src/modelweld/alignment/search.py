"""One alignment: symmetries proved, activations collected once, units matched, and the result checked on the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modelweld.alignment.models import Member, load, proved
from modelweld.alignment.rows import Calibration, calibration_of, call_of
from modelweld.alignment.scoring import Scorer
from modelweld.alignment.unit_similarity import likeness
from modelweld.config.align import Align
from modelweld.engine import Inputs, Plan
from modelweld.errors import ConfigError, MergeError
from modelweld.symmetry import Alignment, Spec, Zipped, align, zip_models
from modelweld.symmetry.instances import example_inputs
from modelweld.symmetry.invariance import TOLERANCE, output_error
from modelweld.symmetry.observing import observe
from modelweld.symmetry.view import Stored


@dataclass(frozen=True)
class Found:
    """Where units go, the alpha that was used and how it scored beside others, and how exact it all is.

    `stood_in`: the curve is that of the mean, because the recipe's method takes too long to be tried. `likeness` shows
    some groups' similarities before and after.
    """

    placement: Alignment | Zipped
    alpha: float
    curve: Mapping[float, float] | None
    stood_in: bool
    calibration: Mapping[str, Any] | None
    proofs: Mapping[str, float]
    preserved: Mapping[str, float]
    likeness: Sequence[Mapping[str, Any]]


def search(
    settings: Align, plan: Plan, common: Spec, members: Sequence[Member], inputs: Inputs, scratch: Path
) -> Found:
    """The alignment of `members`. Models that calibration rows are run on are in memory together, others one by one.

    What the rows showed is kept in `scratch` until the units are matched. Raises ConfigError for rows that the settings
    need and do not name, MergeError for a symmetry that does not hold.
    """
    wants = _wants_activations(settings)
    calibration = calibration_of(settings, inputs) if wants else None
    models: list[nn.Module] = []
    proofs: dict[str, float] = {}
    for member in members:
        model = load(member, inputs)
        proofs[member.label] = proved(model, member)
        if calibration is not None:
            models.append(model)
        del model
    activations = _observed(settings, members, models, calibration, scratch) if calibration is not None else {}
    if settings.alpha != "auto":
        # Only a search for alpha runs them again.
        models.clear()
    match = _matcher(settings, common, members, activations)
    curve, stood_in = None, False
    if settings.alpha == "auto" and calibration is not None:
        scorer = Scorer(settings, plan, members, models, inputs, calibration)
        curve, stood_in = scorer.curve(match), scorer.stood_in
        alpha = max(curve, key=lambda value: (curve[value], -abs(value - 0.5)))
    elif settings.space == "activations":
        alpha = 0.0
    else:
        alpha = settings.alpha if wants and settings.alpha != "auto" else 1.0
    placement = match(alpha)
    shown = likeness(common, members, activations, alpha, placement) if isinstance(placement, Alignment) else []
    del models, activations, match
    preserved = _preserved(placement, members, inputs) if isinstance(placement, Alignment) else {}
    record = calibration.record if calibration else None
    return Found(placement, alpha, curve, stood_in, record, proofs, preserved, shown)


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
    settings: Align, common: Spec, members: Sequence[Member], activations: Mapping[str, Tensor]
) -> Callable[[float], Alignment | Zipped]:
    states = [Stored(member.checkpoint, member.names) for member in members]
    options: dict[str, Any] = {"seed": settings.seed, "patience": settings.patience, "sweeps": settings.sweeps}
    if settings.mode == "align":
        return lambda alpha: align(states, common, activations, alpha, **options)
    zipped = partial(zip_models, inside=settings.inside, budget=settings.budget)
    return lambda alpha: zipped(states, common, activations, alpha, **options)


def _observed(
    settings: Align, members: Sequence[Member], models: Sequence[nn.Module], calibration: Calibration, scratch: Path
) -> Mapping[str, Tensor]:
    first = members[0]
    for member, model in zip(members, models, strict=True):
        if type(model) is not type(models[0]):
            raise MergeError(
                f"{member.label} is a {type(model).__name__}, {first.label} a {type(models[0]).__name__}",
                where="align",
                hint="align by weights alone: space: weights",
            )
    calls = [call_of(models[0], batch) for batch in calibration.batches]
    return observe(models, first.live, calls, whole=settings.mode == "zip", scratch=scratch)


def _preserved(found: Alignment, members: Sequence[Member], inputs: Inputs) -> dict[str, float]:
    """By model, how far the permutations that were found move its outputs; MergeError where they do."""
    preserved = {}
    for member, permutations in zip(members, found.permutations, strict=True):
        model = load(member, inputs)
        error = output_error(model, member.live, example_inputs(model), permutations)
        preserved[member.label] = error
        if error >= TOLERANCE:
            raise MergeError(
                f"its alignment changes what it computes by {error:.1e}", where=member.label, hint="report this"
            )
    return preserved
