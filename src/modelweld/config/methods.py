"""Parameters of every merge method: what a recipe may say after `method:`.

The functions that use them live in `modelweld.methods`, one a file; they are declared here, in the lowest room, because
the recipe's schema and its refusals must not import torch.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from modelweld.config.strict import Strict

Share = Annotated[float, Field(ge=0.0, le=1.0)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
DropRate = Annotated[float, Field(ge=0.0, lt=1.0)]


class MethodParameters(Strict):
    """What every method takes: `scale` multiplies the merged delta (or, without a base, the merged weight)."""

    aligns: ClassVar[bool] = False  # whether its recipes align the experts without an `align:` section

    method: str
    scale: float = 1.0


class Average(MethodParameters):
    """The plain mean of the experts' weights."""

    method: Literal["average"] = "average"


class Linear(MethodParameters):
    """The weighted sum of the experts' weights, divided by the sum of the weights when `normalize` is set."""

    method: Literal["linear"] = "linear"
    normalize: bool = True


class TaskArithmetic(MethodParameters):
    """Base plus the weighted sum of the task vectors (arXiv 2212.04089)."""

    method: Literal["task_arithmetic"] = "task_arithmetic"


class Ties(MethodParameters):
    """Trim, elect sign, disjoint mean (arXiv 2306.01708). `density` is the share of each task vector that is kept."""

    method: Literal["ties"] = "ties"
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    disjoint_mean: bool = True


class Dare(MethodParameters):
    """Drop at random and rescale (arXiv 2311.03099), then combine linearly or by TIES' sign election."""

    method: Literal["dare"] = "dare"
    drop_rate: DropRate = 0.9
    rescale: bool = True
    combine: Literal["linear", "ties"] = "linear"
    seed: int = 0


class Drm(MethodParameters):
    """Decom-Renorm-Merge (arXiv 2505.23117): prune and merge in the joint singular basis of all task vectors."""

    method: Literal["drm"] = "drm"
    direction: Literal["horizontal", "vertical", "auto"] = "horizontal"
    drop_rate: DropRate = 0.8
    rank_tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-2
    disjoint_mean: bool = True


class Slerp(MethodParameters):
    """Spherical interpolation from the first of two models (t = 0) to the second (t = 1)."""

    method: Literal["slerp"] = "slerp"
    t: Share | None = Field(None, description="null takes the second model's share of the weights")


class ModelStock(MethodParameters):
    """The experts' mean, drawn towards the base by the angle between the task vectors (arXiv 2403.19522)."""

    method: Literal["model_stock"] = "model_stock"


class Breadcrumbs(MethodParameters):
    """Drop the largest (`gamma`) and smallest entries until `density` remains (arXiv 2312.06795), then combine."""

    method: Literal["breadcrumbs"] = "breadcrumbs"
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    gamma: Share = 0.01
    combine: Literal["linear", "ties"] = "linear"

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.density + self.gamma > 1 + 1e-9:
            raise ValueError(f"density {self.density} + gamma {self.gamma} may be at most 1")
        return self


class Della(MethodParameters):
    """Drop at random, smaller entries likelier, and rescale (arXiv 2406.11617). Rates: drop_rate ± epsilon / 2."""

    method: Literal["della"] = "della"
    drop_rate: DropRate = 0.7
    epsilon: Share = 0.2
    rescale: bool = True
    combine: Literal["linear", "ties"] = "ties"
    seed: int = 0

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        if self.drop_rate - self.epsilon / 2 < 0 or self.drop_rate + self.epsilon / 2 >= 1:
            raise ValueError(f"drop_rate {self.drop_rate} ± epsilon {self.epsilon} / 2 must stay within [0, 1)")
        return self


class Knots(MethodParameters):
    """Merge in the joint singular basis by TIES or by the sum (arXiv 2410.19735)."""

    method: Literal["knots"] = "knots"
    combine: Literal["linear", "ties"] = "ties"
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    merge_scaled: bool = Field(False, description="merge ΣV as the authors' code does; false merges V, as their paper")
    rank_tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-5


class LeastInterference(MethodParameters):
    """Least interference with every task's own inputs, outputs or both, in closed form (after arXiv 2503.08099)."""

    method: Literal["least_interference"] = "least_interference"
    side: Literal["input", "output", "both"] = Field(
        "input",
        description="what must not be disturbed; `both` is slower, and holds on experts that interfere strongly",
    )
    power: NotNegative | None = Field(
        None, description="exponent of the spectrum that weighs directions; null is 1, of both sides 0.75"
    )
    target_power: NotNegative | None = Field(
        None, description="exponent of the spectrum that is aimed at; null is 1, of both sides 0.5"
    )
    ridge: NotNegative | None = Field(
        None, description="share of the mean direction that is added to all; null is 0.03, of both sides 0.02"
    )
    t: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = Field(
        None, description="exponent of the mean of both sides; null is unbounded, the larger of the two"
    )


class TsvM(MethodParameters):
    """Orthogonalised leading singular vectors of every task (arXiv 2412.00081)."""

    method: Literal["tsv_m"] = "tsv_m"
    rank_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="share of the singular triples each task keeps; null is 1 / number of models"
    )
    spectrum_power: Annotated[float, Field(ge=0.0)] = Field(1.0, description="1 is the paper's, 0 a flat spectrum")


class IsoC(MethodParameters):
    """The sum of the task vectors with a flat spectrum (arXiv 2502.04959)."""

    method: Literal["iso_c"] = "iso_c"


class IsoCts(MethodParameters):
    """Iso-C whose weakest directions are replaced by task-specific ones (arXiv 2502.04959)."""

    method: Literal["iso_cts"] = "iso_cts"
    common_share: Share = 0.8


class Pcb(MethodParameters):
    """Weigh every entry by its competition within and across tasks (arXiv 2410.02396); `density` of them count."""

    method: Literal["pcb"] = "pcb"
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1


class Mudsc(MethodParameters):
    """MuDSC (arXiv 2403.01753): bring the experts' units to one order, then average. Its settings stand in `align:`."""

    aligns: ClassVar[bool] = True

    method: Literal["mudsc"] = "mudsc"


# Every class above that names a method, in the order of this file.
METHODS: tuple[type[MethodParameters], ...] = tuple(
    kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, MethodParameters) and kind is not MethodParameters
)
