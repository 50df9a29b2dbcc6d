"""Merge finetuned models in production, and prove it later.

`merge` merges experts by a recipe, `plan` says beforehand what that takes, and `load` opens a merged directory with one
task's head. `derive_spec` and `align` bring models of different initialisations to one order of units. Subpackages:
`modelweld.merging` (the methods as functions on tensors), `modelweld.symmetry` (alignment), `modelweld.config` (recipes
and params.yaml), `modelweld.evaluation` (scores), `modelweld.formats` (the documents that a run writes) and
`modelweld.errors`.

    import modelweld
    modelweld.merge("recipe.yaml", "merged")
    model = modelweld.load("merged", task="sst2")

Everything is imported on first use. What these packages list in `__all__` is stable; all else may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from modelweld import config, errors, evaluation, formats, merging, symmetry
    from modelweld.checkpoints.loading import load
    from modelweld.stages.merge import merge
    from modelweld.stages.plan import plan
    from modelweld.symmetry import align, derive_spec

__all__ = [
    "align",
    "config",
    "derive_spec",
    "errors",
    "evaluation",
    "formats",
    "load",
    "merge",
    "merging",
    "plan",
    "symmetry",
]

_SUBPACKAGES = frozenset({"config", "errors", "evaluation", "formats", "merging", "symmetry"})
_DEFINED_IN = {
    "align": "modelweld.symmetry",
    "derive_spec": "modelweld.symmetry",
    "load": "modelweld.checkpoints.loading",
    "merge": "modelweld.stages.merge",
    "plan": "modelweld.stages.plan",
}


def __getattr__(name: str) -> Any:
    # Importing modelweld must not import torch: every name is imported on first use.
    from importlib import import_module

    if name in _SUBPACKAGES:
        return import_module(f"modelweld.{name}")
    if name in _DEFINED_IN:
        return getattr(import_module(_DEFINED_IN[name]), name)
    raise AttributeError(f"module 'modelweld' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
