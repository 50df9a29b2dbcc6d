"""The merge methods, for callers: pure functions over tensors.

    from modelweld.merging import drm
    merged = drm.merge(deltas, direction="horizontal", drop_rate=0.8)  # deltas (N, n, m)

The modules are those of `modelweld.methods`; this name is the one that stays.
"""

from modelweld.methods import (
    LowRank,
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
