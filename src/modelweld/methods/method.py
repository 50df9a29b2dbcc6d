"""What a merge method declares about itself, and the one checked way to call it.

A method is a module with a plain function, and a declaration as its last lines:

    METHOD = Method(config.Ties, merge, summary="trim, elect signs, mean of those who agree")

The engine asks the declaration for everything that it has to know of a method: it tests for no method by name.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from modelweld.config.methods import MethodParameters
from modelweld.errors import MergeError
from modelweld.methods.numerics.low_rank import LowRank, require_finite_factors
from modelweld.methods.numerics.operands import Weights, require_finite
from modelweld.methods.numerics.rng import stream_keys
from modelweld.methods.numerics.work import Work, joint_basis_work, joint_factor_work
from modelweld.methods.streaming import Kernel, KernelInputs, Metric, StatisticsPass

P = TypeVar("P", bound=MethodParameters)
# What a method's function may take beside its own parameters.
OFFERED = frozenset({"weights", "keys", "offset", "diagnostics", "cache"})
_NOT_BOUND = frozenset({"method", "scale", "seed"})  # of the parameters: applied by Method, or bound as `keys`


@dataclass(frozen=True)
class TensorContext:
    """Which tensor is merged, for seeds and errors; `expert_digests` and `experts` are in the models' order.

    A method leaves in `diagnostics` what a report shows of this tensor, as 0-d tensors that are not waited for: the
    `rank` of its basis, the `kept_share` of the entries that pruning leaves, `sign_conflicts`, the share of those that
    the election then discards, the `interference` that is left, and the `direction` that `auto` became. `cache` is set
    when the same tensor is merged again with other parameters: a method keeps in it what does not depend on them.
    """

    name: str
    expert_digests: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    offset: int = 0  # of a flat chunk inside its tensor
    finite: bool = False  # the caller has already checked that every value is finite
    diagnostics: dict[str, Metric] = field(default_factory=dict, compare=False)
    cache: dict[Hashable, Any] | None = field(default=None, compare=False)


def _sum_of_ranks(ranks: Sequence[int]) -> int:
    return sum(ranks)


def _never(parameters: MethodParameters) -> bool:
    return False


def _joint_basis_work(parameters: MethodParameters, models: int, n: int, m: int) -> Work:
    return joint_basis_work(models, n, m)


def _joint_factor_work(parameters: MethodParameters, models: int, rank: int, n: int, m: int) -> Work:
    return joint_factor_work(models, rank, n, m)


@dataclass(frozen=True)
class Method(Generic[P]):
    """A merge method: its parameters, its function, and what the engine has to know to run it.

    `function` takes the stack `(N, *shape)` and, by keyword, fields of `parameters` and any of: `weights`, `keys` (one
    random stream per model), `offset` (where a chunk begins in its tensor), `diagnostics` and `cache` (see
    TensorContext). It returns `(*shape)`. `parameters.scale` is applied to what it returns. A function without
    `weights` refuses recipes that give the models different ones.

    The rest is what the planner and the executors ask:

    - `space`: `delta` methods get task vectors and return one; `weight` methods get and return weights.
    - `shape`: `elementwise` methods may be given any flat chunk; `tensor` methods get a whole tensor of any shape;
      `matrix` methods get whole 2-D weights.
    - `models`: the least and the largest number of models, None for no limit.
    - `idempotent`: of a `weight` method, whether equal models come out as they are (with `scale` 1).
    - `low_rank`: the same on LoRA factors, for methods that can stay in them; `output_rank` is the rank of its result.
    - `statistics` and `host_kernel`: the streamed, compiled form in host memory; it gives what `function` gives.
    - `working_bytes`: peak memory of one `(models, n, m)` weight on a CPU beside the stack, where it was derived.
    - `matrix_work` and `factor_work`: operations on one weight, dense and from factors of a total rank.

    `version` changes when the result does. Raises TypeError for a function whose keywords do not fit the parameters.
    """

    parameters: type[P]
    function: Callable[..., Tensor]
    summary: str
    source: str | None = None
    space: Literal["delta", "weight"] = "delta"
    shape: Literal["elementwise", "tensor", "matrix"] = "tensor"
    models: tuple[int, int | None] = (1, None)
    version: str = "1"
    idempotent: Callable[[P], bool] = _never
    low_rank: Callable[..., LowRank] | None = None
    output_rank: Callable[[Sequence[int]], int] = _sum_of_ranks
    statistics: StatisticsPass[P] | None = None
    host_kernel: Callable[[P, KernelInputs], Kernel] | None = None
    working_bytes: Callable[[P, int, int, int], int] | None = None
    matrix_work: Callable[[P, int, int, int], Work] = _joint_basis_work
    factor_work: Callable[[P, int, int, int, int], Work] = _joint_factor_work

    def __post_init__(self) -> None:
        for function in (self.function, self.low_rank):
            if function is not None:
                _require_fitting(function, self.parameters)
        if self.statistics is not None and (self.host_kernel is None or self.shape != "tensor"):
            raise TypeError(f"{self.name}: a statistics pass needs a host kernel, and shape='tensor'")

    @property
    def name(self) -> str:
        """The method's name in a recipe."""
        name: str = self.parameters.model_fields["method"].default
        return name

    @property
    def needs_base(self) -> bool:
        """Whether it merges task vectors."""
        return self.space == "delta"

    @property
    def elementwise(self) -> bool:
        """Whether any flat chunk can be merged by itself."""
        return self.shape == "elementwise"

    @property
    def whole_matrix(self) -> bool:
        """Whether it takes whole 2-D weights only."""
        return self.shape == "matrix"

    @property
    def streamed(self) -> bool:
        """Whether a tensor of any size is merged in chunks in host memory."""
        return self.elementwise or self.statistics is not None

    @property
    def seeded(self) -> bool:
        """Whether it draws random numbers, whose streams are keyed by the experts' bytes."""
        return "keys" in _keywords(self.function)

    @property
    def weighted(self) -> bool:
        """Whether the models' weights change its result."""
        return "weights" in _keywords(self.function)

    def keeps_equal_models(self, parameters: MethodParameters) -> bool:
        """Whether models that equal the base give the base, so that what no expert changed need not be merged."""
        return self.needs_base or (parameters.scale == 1.0 and self.idempotent(self._own(parameters)))

    def merge(
        self, deltas: Tensor, parameters: MethodParameters, weights: Weights, *, context: TensorContext
    ) -> Tensor:
        """`(*shape)`: the stack `(N, *shape)` merged and scaled, in the method's arithmetic (float32 or float64).

        Raises MergeError naming the tensor for too few or too many models, shapes the method cannot take, weights
        that do not fit, and values that are not finite (in host memory).
        """
        with _naming(context):
            self._check(deltas.shape[0] if deltas.ndim else 0, parameters, weights)
            if not context.finite:
                require_finite(deltas, context.experts)
            merged = self.function(deltas, **_bound(self.function, self._own(parameters), weights, context))
        return merged if parameters.scale == 1.0 else merged.mul_(parameters.scale)

    def merge_low_rank(
        self, factors: Sequence[LowRank], parameters: MethodParameters, weights: Weights, *, context: TensorContext
    ) -> LowRank:
        """The factors of what `merge` makes of the dense matrices, scaled, in float64; raises MergeError as it does.

        Also raises MergeError when the method has no way to stay low-rank.
        """
        with _naming(context):
            self._check(len(factors), parameters, weights)
            if self.low_rank is None:
                raise MergeError(
                    f"{self.name} does not work on low-rank factors",
                    hint="merge densely; `modelweld methods` lists those that do",
                )
            if not context.finite:
                require_finite_factors(factors, context.experts)
            merged = self.low_rank(factors, **_bound(self.low_rank, self._own(parameters), weights, context))
        return merged if parameters.scale == 1.0 else LowRank(merged.B * parameters.scale, merged.A)

    def _own(self, parameters: MethodParameters) -> P:
        if not isinstance(parameters, self.parameters):
            raise MergeError(f"{type(parameters).__name__} are not parameters of {self.name}")
        return parameters

    def _check(self, count: int, parameters: MethodParameters, weights: Weights) -> None:
        least, most = self.models
        if count < least or (most is not None and count > most):
            wants = f"exactly {most}" if most == least else f"at least {least}" if count < least else f"at most {most}"
            raise MergeError(f"{self.name} merges {wants} models, not {count}", hint="change `models:` or the method")
        if not math.isfinite(parameters.scale):
            raise MergeError(f"scale is {parameters.scale}", hint="give a finite number")
        if isinstance(weights, Tensor):
            return
        if not all(map(math.isfinite, weights)):
            raise MergeError(f"the weights are {', '.join(map(str, weights))}", hint="give finite numbers")
        if not self.weighted and len(set(weights)) > 1:
            raise MergeError(f"{self.name} takes no weights", hint="leave them out, or use a method that honours them")


@functools.cache
def _keywords(function: Callable[..., Any]) -> Mapping[str, bool]:
    """The keyword-only parameters of a function, and whether each has a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


def _require_fitting(function: Callable[..., Any], parameters: type[MethodParameters]) -> None:
    """Raise TypeError for a keyword that nothing fills, and for a parameter that would change nothing."""
    keywords, fields = _keywords(function), parameters.model_fields.keys()
    unknown = [name for name, default in keywords.items() if not default and name not in fields | OFFERED]
    ignored = fields - keywords.keys() - _NOT_BOUND
    if "seed" in fields and not {"seed", "keys"} & keywords.keys():
        ignored |= {"seed"}
    if unknown or ignored:
        reasons = [f"takes {name}, which is neither a parameter nor offered" for name in unknown]
        reasons += [f"does not take the parameter {name}" for name in sorted(ignored)]
        where = f"{function.__module__}.{function.__qualname__}"
        raise TypeError(f"{where} is no function of {parameters.__name__}: it {', and '.join(reasons)}")


def _bound(
    function: Callable[..., Any], parameters: MethodParameters, weights: Weights, context: TensorContext
) -> dict[str, Any]:
    """The keyword arguments of a method's function: its parameters by name, and what else it asks for."""
    wanted = _keywords(function)
    bound = {name: getattr(parameters, name) for name in wanted if name in type(parameters).model_fields}
    if "weights" in wanted:
        bound["weights"] = weights
    if "keys" in wanted:
        bound["keys"] = stream_keys(getattr(parameters, "seed", 0), context.name, context.expert_digests)
    if "offset" in wanted:
        bound["offset"] = context.offset
    if "diagnostics" in wanted:
        bound["diagnostics"] = context.diagnostics
    if "cache" in wanted and context.cache is not None:
        # The projections of a packed weight share the tensor's cache, each under its own name.
        bound["cache"] = context.cache.setdefault(context.name, {})
    return bound


@contextmanager
def _naming(context: TensorContext) -> Iterator[None]:
    """Puts the tensor's name into the errors that leave the block."""
    try:
        yield
    except MergeError as error:
        where = f"{context.name}, {error.where}" if error.where else context.name
        raise MergeError(error.what, where=where, hint=error.hint) from error
