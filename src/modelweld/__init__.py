"""Merge finetuned models in production, and prove it later.

`merge` welds experts by a recipe; `load` opens a merged directory with one task's head. Everything else is a room of
its own: `modelweld.methods` (the methods), `modelweld.symmetry` (alignment), `modelweld.config` (recipes and params).

    import modelweld
    modelweld.merge("recipe.yaml", "merged")
    model = modelweld.load("merged", task="sst2")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelweld.checkpoints.loading import load
    from modelweld.stages.merge import merge

__all__ = ["load", "merge"]


def __getattr__(name: str) -> Any:
    # Importing modelweld must not import torch: the two doors open on first use.
    if name == "load":
        from modelweld.checkpoints.loading import load

        return load
    if name == "merge":
        from modelweld.stages.merge import merge

        return merge
    raise AttributeError(f"module 'modelweld' has no attribute {name!r}")
