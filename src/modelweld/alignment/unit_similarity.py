"""Similarity of two models' units before and after they are matched, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from modelweld.alignment.models import AlignedModel
from modelweld.formats.alignment import ShownSimilarity
from modelweld.symmetry import Alignment, Spec
from modelweld.symmetry.families import Family, families
from modelweld.symmetry.similarity import weight_similarity
from modelweld.symmetry.view import Stored

SHOWN_GROUPS = 3
SHOWN_UNITS = 48
_DIGITS = 3


def unit_similarity(
    common: Spec, models: Sequence[AlignedModel], activations: Mapping[str, Tensor], alpha: float, found: Alignment
) -> list[ShownSimilarity]:
    """A few groups' similarity of the first model's units to the second's, in its own order and in the common one.

    The groups are from the beginning, the middle and the end of the model; of a wide group some units are shown.
    """
    states = [Stored(model.checkpoint, model.names) for model in models]
    plain = [family for family in families(common).values() if not family.inner]
    every = [family for family in plain if family.outer in activations or family.of(family.outer)]
    shown = sorted({round(index) for index in np.linspace(0, len(every) - 1, min(SHOWN_GROUPS, len(every)))})
    return [_shown(every[index], states, models, activations, alpha, found) for index in shown]


def _shown(
    family: Family,
    states: Sequence[Stored],
    models: Sequence[AlignedModel],
    activations: Mapping[str, Tensor],
    alpha: float,
    found: Alignment,
) -> ShownSimilarity:
    group = family.outer
    weights = weight_similarity(family, group, states, found.placed, whole=False) if alpha > 0.0 else None
    active = activations.get(group)
    units = found.permutations[1][group].numel()
    between = np.zeros((units, units))  # (units of the first model, units of the second)
    for share, similarity in ((alpha if active is not None else 1.0, weights), (1.0 - alpha, active)):
        if similarity is not None:
            # The second model's columns follow the first one's own, if the similarity has these.
            start = similarity.shape[1] - (len(models) - 1) * units
            between += share * similarity[:units, start : start + units].double().numpy()  # (units, units)
    moved = found.permutations[1][group].numpy()
    rows = np.unique(np.linspace(0, units - 1, min(SHOWN_UNITS, units)).round().astype(int))
    # From plain JSON values, as the record holds them.
    return ShownSimilarity.model_validate(
        {
            "group": group,
            "models": [model.label for model in models[:2]],
            "units": rows.tolist(),
            # (rows, rows) of (units, units)
            "before": between[np.ix_(rows, rows)].round(_DIGITS).tolist(),
            "after": between[np.ix_(rows, moved[rows])].round(_DIGITS).tolist(),
            "matched": {
                "before": round(float(np.diag(between).mean()), _DIGITS),
                "after": round(float(between[np.arange(units), moved].mean()), _DIGITS),
            },
        }
    )
