"""The merge methods, for callers: pure functions over tensors.

    from modelweld.merging import drm
    merged = drm.merge(deltas, direction="horizontal", drop_rate=0.8)  # deltas (N, n, m)

The modules are those of `modelweld.methods`, one per method, and open on first use. `Method` and `MethodParameters` are
what a package declares a method of its own with.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

from modelweld.config.methods import METHODS as _PARAMETERS

if TYPE_CHECKING:
    from modelweld.config.methods import MethodParameters as MethodParameters
    from modelweld.methods import average as average
    from modelweld.methods import breadcrumbs as breadcrumbs
    from modelweld.methods import dare as dare
    from modelweld.methods import della as della
    from modelweld.methods import drm as drm
    from modelweld.methods import iso_c as iso_c
    from modelweld.methods import iso_cts as iso_cts
    from modelweld.methods import knots as knots
    from modelweld.methods import least_interference as least_interference
    from modelweld.methods import linear as linear
    from modelweld.methods import model_stock as model_stock
    from modelweld.methods import mudsc as mudsc
    from modelweld.methods import pcb as pcb
    from modelweld.methods import slerp as slerp
    from modelweld.methods import task_arithmetic as task_arithmetic
    from modelweld.methods import ties as ties
    from modelweld.methods import tsv_m as tsv_m
    from modelweld.methods.method import Method as Method
    from modelweld.methods.numerics.low_rank import LowRank as LowRank

_MODULES = tuple(kind.model_fields["method"].default for kind in _PARAMETERS)
_CLASSES = {
    "LowRank": "modelweld.methods.numerics.low_rank",
    "Method": "modelweld.methods.method",
    "MethodParameters": "modelweld.config.methods",
}

__all__ = sorted([*_CLASSES, *_MODULES])


def __getattr__(name: str) -> _Any:
    if name in _MODULES:
        return _import_module(f"modelweld.methods.{name}")
    if name in _CLASSES:
        return getattr(_import_module(_CLASSES[name]), name)
    raise AttributeError(f"module 'modelweld.merging' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
