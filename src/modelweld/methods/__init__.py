"""Merge methods as pure functions, tensors in and a tensor out: one module per method, which declares itself.

    from modelweld.methods import drm
    merged = drm.merge(deltas, direction="horizontal", drop_rate=0.8)  # deltas (N, n, m)

`method` says what a method declares, `registry` finds them all, `streaming` is the form for tensors of any size, and
`numerics` is what several methods compute with.
"""

from modelweld.methods.numerics.low_rank import LowRank

__all__ = ["LowRank"]
