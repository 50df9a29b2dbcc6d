"""MuDSC: the mean of models whose units were brought to one order first (arXiv 2403.01753).

What comes in is aligned already (`modelweld.alignment` does that): the rest of the method is the mean.
"""

from __future__ import annotations

from modelweld.config import methods as config
from modelweld.methods.average import kernel, merge
from modelweld.methods.method import Method

METHOD = Method(
    config.Mudsc,
    merge,
    summary="match the units of the models by weights and activations, then the mean of the weights",
    source="2403.01753",
    space="weight",
    shape="elementwise",
    models=(2, None),
    idempotent=lambda parameters: True,
    host_kernel=kernel,
)
