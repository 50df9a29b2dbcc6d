"""Merge methods as pure functions, tensors in and a tensor out: one module a method, `registry` knows them all.

    from modelweld.methods import drm
    merged = drm.merge(deltas, direction="horizontal", drop_rate=0.8)  # deltas (N, n, m)

What the methods share is beside them: `selection` (exact thresholds), `election` (signs and the disjoint mean),
`operands` (what is asked of the input).
"""

from modelweld.methods import (
    average,
    breadcrumbs,
    dare,
    della,
    drm,
    iso_c,
    iso_cts,
    knots,
    linear,
    model_stock,
    pcb,
    slerp,
    task_arithmetic,
    ties,
    tsv_m,
)
from modelweld.methods.numerics.low_rank import LowRank

__all__ = [
    "LowRank",
    "average",
    "breadcrumbs",
    "dare",
    "della",
    "drm",
    "iso_c",
    "iso_cts",
    "knots",
    "linear",
    "model_stock",
    "pcb",
    "slerp",
    "task_arithmetic",
    "ties",
    "tsv_m",
]
