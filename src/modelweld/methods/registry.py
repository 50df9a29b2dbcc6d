"""Every merge method by name, with what it needs and one way to call it.

    chosen = method("ties")
    merged = chosen.merge(deltas, chosen.parameters(), [1.0, 1.0], context=TensorContext("layer.0.weight"))

The methods themselves are plain functions, one a file; the small adapters here translate a recipe's parameters.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from modelweld.config import methods as config
from modelweld.config.methods import MethodParameters
from modelweld.errors import MergeError
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
from modelweld.methods.numerics.low_rank import LowRank, require_finite_factors
from modelweld.methods.numerics.operands import Weights, require_finite
from modelweld.methods.numerics.rng import stream_keys

# A number that may still be in the making on a device, or a word.
Note: TypeAlias = "Tensor | float | int | str"

P = TypeVar("P", bound=MethodParameters)
X = TypeVar("X")
Y = TypeVar("Y")


@dataclass(frozen=True)
class TensorContext:
    """Which tensor this is, for seeds and errors; `expert_digests` and `experts` are in the models' order.

    A method leaves in `notes` what a report wants to know of this tensor, as 0-d tensors that are not waited for: the
    `rank` of its basis, the `kept_share` of the entries that pruning leaves, `sign_conflicts`, the share of those that
    the election then discards, and the `direction` that `auto` became. `kept` is there when the same tensor is merged
    again with other parameters: a method keeps in it what does not depend on them.
    """

    name: str
    expert_digests: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    base: Tensor | None = None
    offset: int = 0  # of a flat chunk inside its tensor
    finite: bool = False  # the caller has already seen that every value is finite
    notes: dict[str, Note] = field(default_factory=dict, compare=False)
    kept: dict[Hashable, Any] | None = field(default=None, compare=False)


Function = Callable[[Tensor, MethodParameters, Weights, TensorContext], Tensor]
LowRankFunction = Callable[[Sequence[LowRank], MethodParameters, Weights, TensorContext], LowRank]


@dataclass(frozen=True)
class Method:
    """What a method is called, what it needs, and how it is applied.

    `needs_base`: the stack holds task vectors, the result is one; otherwise both are weights. `elementwise`: any flat
    chunk can be merged by itself. `whole_matrix`: the tensor must be 2-D and whole. Otherwise: any shape, whole.
    `low_rank` is there for methods
    that can stay in the factors of LoRA adapters. `version` changes with the result.
    """

    name: str
    parameters: type[MethodParameters]
    function: Function
    needs_base: bool = True
    min_models: int = 1
    max_models: int | None = None
    elementwise: bool = False
    whole_matrix: bool = False
    low_rank: LowRankFunction | None = None
    version: str = "1"

    def merge(
        self, deltas: Tensor, parameters: MethodParameters, weights: Weights, *, context: TensorContext
    ) -> Tensor:
        """`(*shape)`: the stack `(N, *shape)` merged and scaled, in the method's arithmetic (float32 or float64).

        Raises MergeError naming the tensor for too few or too many models, shapes the method cannot take, weights
        that do not fit, and values that are not finite (in host memory).
        """
        with _naming(context):
            self._check_count(deltas.shape[0] if deltas.ndim else 0)
            if not context.finite:
                require_finite(deltas, context.experts)
            merged = self.function(deltas, parameters, weights, context)
        return merged if parameters.scale == 1.0 else merged.mul_(parameters.scale)

    def merge_low_rank(
        self, factors: Sequence[LowRank], parameters: MethodParameters, weights: Weights, *, context: TensorContext
    ) -> LowRank:
        """The factors of what `merge` makes of the dense matrices, scaled, in float64; raises MergeError as it does.

        Also raises MergeError when the method has no way to stay low-rank.
        """
        with _naming(context):
            self._check_count(len(factors))
            if self.low_rank is None:
                able = ", ".join(name for name, entry in _METHODS.items() if entry.low_rank)
                raise MergeError(f"{self.name} does not work on low-rank factors", hint=f"merge densely, or use {able}")
            if not context.finite:
                require_finite_factors(factors, context.experts)
            merged = self.low_rank(factors, parameters, weights, context)
        return merged if parameters.scale == 1.0 else LowRank(merged.B * parameters.scale, merged.A)

    def _check_count(self, count: int) -> None:
        if count < self.min_models or (self.max_models is not None and count > self.max_models):
            most = self.max_models
            wants = f"exactly {most}" if most == self.min_models else f"at least {self.min_models}"
            raise MergeError(f"{self.name} merges {wants} models, not {count}", hint="change `models:` or the method")


@contextmanager
def _naming(context: TensorContext) -> Iterator[None]:
    """Puts the tensor's name into the errors that leave the block."""
    try:
        yield
    except MergeError as error:
        where = f"{context.name}, {error.where}" if error.where else context.name
        raise MergeError(error.what, where=where, hint=error.hint) from error


def _adapted(
    kind: type[P], call: Callable[[X, P, Weights, TensorContext], Y]
) -> Callable[[X, MethodParameters, Weights, TensorContext], Y]:
    def function(operands: X, parameters: MethodParameters, weights: Weights, context: TensorContext) -> Y:
        if not isinstance(parameters, kind):
            raise MergeError(f"{type(parameters).__name__} are not parameters of {kind.model_fields['method'].default}")
        return call(operands, parameters, weights, context)

    return function


def _unweighted(name: str, weights: Weights) -> None:
    if not isinstance(weights, Tensor) and len(set(weights)) > 1:
        raise MergeError(f"{name} takes no weights", hint="leave them out, or use a method that honours them")


def _average(stack: Tensor, _: config.Average, weights: Weights, context: TensorContext) -> Tensor:
    _unweighted("average", weights)
    return average.merge(stack)


def _mudsc(stack: Tensor, _: config.Mudsc, weights: Weights, context: TensorContext) -> Tensor:
    # What comes in is aligned already: the rest of the method is the mean.
    _unweighted("mudsc", weights)
    return average.merge(stack)


def _linear(stack: Tensor, p: config.Linear, weights: Weights, context: TensorContext) -> Tensor:
    return linear.merge(stack, weights=weights, normalize=p.normalize)


def _task_arithmetic(deltas: Tensor, _: config.TaskArithmetic, weights: Weights, context: TensorContext) -> Tensor:
    return task_arithmetic.merge(deltas, weights=weights)


def _ties(deltas: Tensor, p: config.Ties, weights: Weights, context: TensorContext) -> Tensor:
    return ties.merge(deltas, density=p.density, weights=weights, disjoint_mean=p.disjoint_mean, notes=context.notes)


def _dare(deltas: Tensor, p: config.Dare, weights: Weights, context: TensorContext) -> Tensor:
    keys = stream_keys(p.seed, context.name, context.expert_digests)
    return dare.merge(
        deltas,
        drop_rate=p.drop_rate,
        rescale=p.rescale,
        combine=p.combine,
        weights=weights,
        keys=keys,
        offset=context.offset,
    )


def _drm(deltas: Tensor, p: config.Drm, weights: Weights, context: TensorContext) -> Tensor:
    basis = _kept_basis(
        p, context, lambda: drm.factorise(deltas, direction=p.direction, rank_tolerance=p.rank_tolerance)
    )
    _note_basis(basis, context)
    return drm.finish(basis, drop_rate=p.drop_rate, weights=weights, disjoint_mean=p.disjoint_mean, notes=context.notes)


def _kept_basis(p: config.Drm, context: TensorContext, factorise: Callable[[], drm.DrmBasis]) -> drm.DrmBasis:
    """The basis, which depends on neither drop rate nor weights, from an earlier merge of this tensor if there was."""
    if context.kept is None:
        return factorise()
    key = (context.name, p.direction, p.rank_tolerance)
    if key not in context.kept:
        context.kept[key] = factorise()
    basis: drm.DrmBasis = context.kept[key]
    return basis


def _note_basis(basis: drm.DrmBasis, context: TensorContext) -> None:
    context.notes.update(rank=basis.rank, direction="vertical" if basis.vertical else "horizontal")


def _slerp(stack: Tensor, p: config.Slerp, weights: Weights, context: TensorContext) -> Tensor:
    return slerp.merge(stack, t=p.t, weights=weights)


def _model_stock(deltas: Tensor, _: config.ModelStock, weights: Weights, context: TensorContext) -> Tensor:
    _unweighted("model_stock", weights)
    return model_stock.merge(deltas)


def _breadcrumbs(deltas: Tensor, p: config.Breadcrumbs, weights: Weights, context: TensorContext) -> Tensor:
    return breadcrumbs.merge(
        deltas, density=p.density, gamma=p.gamma, combine=p.combine, weights=weights, notes=context.notes
    )


def _della(deltas: Tensor, p: config.Della, weights: Weights, context: TensorContext) -> Tensor:
    return della.merge(
        deltas,
        drop_rate=p.drop_rate,
        epsilon=p.epsilon,
        rescale=p.rescale,
        combine=p.combine,
        weights=weights,
        keys=stream_keys(p.seed, context.name, context.expert_digests),
        notes=context.notes,
    )


def _knots(deltas: Tensor, p: config.Knots, weights: Weights, context: TensorContext) -> Tensor:
    return knots.merge(
        deltas,
        combine=p.combine,
        density=p.density,
        weights=weights,
        rank_tolerance=p.rank_tolerance,
        notes=context.notes,
    )


def _tsv_m(deltas: Tensor, p: config.TsvM, weights: Weights, context: TensorContext) -> Tensor:
    return tsv_m.merge(
        deltas, rank_share=p.rank_share, spectrum_power=p.spectrum_power, weights=weights, notes=context.notes
    )


def _iso_c(deltas: Tensor, _: config.IsoC, weights: Weights, context: TensorContext) -> Tensor:
    return iso_c.merge(deltas, weights=weights)


def _iso_cts(deltas: Tensor, p: config.IsoCts, weights: Weights, context: TensorContext) -> Tensor:
    return iso_cts.merge(deltas, common_share=p.common_share, weights=weights)


def _pcb(deltas: Tensor, p: config.Pcb, weights: Weights, context: TensorContext) -> Tensor:
    return pcb.merge(deltas, density=p.density, weights=weights)


def _linear_low_rank(factors: Sequence[LowRank], p: config.Linear, weights: Weights, context: TensorContext) -> LowRank:
    return linear.merge_low_rank(factors, weights=weights, normalize=p.normalize)


def _average_low_rank(
    factors: Sequence[LowRank], _: config.Average, weights: Weights, context: TensorContext
) -> LowRank:
    _unweighted("average", weights)
    return linear.merge_low_rank(factors)


def _task_arithmetic_low_rank(
    factors: Sequence[LowRank], _: config.TaskArithmetic, weights: Weights, context: TensorContext
) -> LowRank:
    return task_arithmetic.merge_low_rank(factors, weights=weights)


def _drm_low_rank(factors: Sequence[LowRank], p: config.Drm, weights: Weights, context: TensorContext) -> LowRank:
    basis = _kept_basis(
        p, context, lambda: drm.factorise_low_rank(factors, direction=p.direction, rank_tolerance=p.rank_tolerance)
    )
    _note_basis(basis, context)
    return drm.finish_low_rank(
        basis, drop_rate=p.drop_rate, weights=weights, disjoint_mean=p.disjoint_mean, notes=context.notes
    )


def _knots_low_rank(factors: Sequence[LowRank], p: config.Knots, weights: Weights, context: TensorContext) -> LowRank:
    return knots.merge_low_rank(
        factors,
        combine=p.combine,
        density=p.density,
        weights=weights,
        rank_tolerance=p.rank_tolerance,
        notes=context.notes,
    )


def _tsv_m_low_rank(factors: Sequence[LowRank], p: config.TsvM, weights: Weights, context: TensorContext) -> LowRank:
    return tsv_m.merge_low_rank(
        factors, rank_share=p.rank_share, spectrum_power=p.spectrum_power, weights=weights, notes=context.notes
    )


def _all() -> Sequence[Method]:
    return (
        Method(
            "average",
            config.Average,
            _adapted(config.Average, _average),
            low_rank=_adapted(config.Average, _average_low_rank),
            needs_base=False,
            elementwise=True,
        ),
        Method(
            "mudsc",
            config.Mudsc,
            _adapted(config.Mudsc, _mudsc),
            min_models=2,
            needs_base=False,
            elementwise=True,
        ),
        Method(
            "linear",
            config.Linear,
            _adapted(config.Linear, _linear),
            low_rank=_adapted(config.Linear, _linear_low_rank),
            needs_base=False,
            elementwise=True,
        ),
        Method(
            "task_arithmetic",
            config.TaskArithmetic,
            _adapted(config.TaskArithmetic, _task_arithmetic),
            low_rank=_adapted(config.TaskArithmetic, _task_arithmetic_low_rank),
            elementwise=True,
        ),
        Method("ties", config.Ties, _adapted(config.Ties, _ties)),
        Method("dare", config.Dare, _adapted(config.Dare, _dare), elementwise=True),
        Method(
            "drm",
            config.Drm,
            _adapted(config.Drm, _drm),
            low_rank=_adapted(config.Drm, _drm_low_rank),
            whole_matrix=True,
        ),
        Method("slerp", config.Slerp, _adapted(config.Slerp, _slerp), needs_base=False, min_models=2, max_models=2),
        Method("model_stock", config.ModelStock, _adapted(config.ModelStock, _model_stock), min_models=2),
        Method("breadcrumbs", config.Breadcrumbs, _adapted(config.Breadcrumbs, _breadcrumbs)),
        Method("della", config.Della, _adapted(config.Della, _della)),
        Method(
            "knots",
            config.Knots,
            _adapted(config.Knots, _knots),
            low_rank=_adapted(config.Knots, _knots_low_rank),
            whole_matrix=True,
        ),
        Method(
            "tsv_m",
            config.TsvM,
            _adapted(config.TsvM, _tsv_m),
            low_rank=_adapted(config.TsvM, _tsv_m_low_rank),
            whole_matrix=True,
        ),
        Method("iso_c", config.IsoC, _adapted(config.IsoC, _iso_c), whole_matrix=True),
        Method("iso_cts", config.IsoCts, _adapted(config.IsoCts, _iso_cts), whole_matrix=True),
        Method("pcb", config.Pcb, _adapted(config.Pcb, _pcb)),
    )


_METHODS: Mapping[str, Method] = MappingProxyType({entry.name: entry for entry in _all()})


def methods() -> Mapping[str, Method]:
    """Every method by its name in a recipe."""
    return _METHODS


def method(name: str) -> Method:
    """The method of that name; raises MergeError with the nearest one otherwise."""
    try:
        return _METHODS[name]
    except KeyError:
        close = difflib.get_close_matches(name, _METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(_METHODS)}"
        raise MergeError(f"unknown method {name!r}", where="method", hint=hint) from None
