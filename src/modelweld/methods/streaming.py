"""The streamed form of a method: a pass that collects statistics where it needs one, and a compiled loop over chunks.

A tensor of any size is merged in chunks that stay in a core's cache. A method that depends on the whole tensor through
a few numbers finds these in a first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from modelweld.config.methods import MethodParameters
from modelweld.methods.numerics import kernels
from modelweld.methods.numerics.kernels import Floats
from modelweld.methods.numerics.operands import Weights, gram

# A number that may still be computed on a device, or a word.
Metric: TypeAlias = "Tensor | float | int | str"

P_contra = TypeVar("P_contra", bound=MethodParameters, contravariant=True)

# Merges a chunk in host memory: the experts' weights (N, n), the base's (n,) or an empty array, where in its tensor the
# chunk begins, and the result (n,), which is written.
Kernel = Callable[[Floats, Floats, int, Floats], None]


class Chunks(Protocol):
    """A whole tensor of every model, offered in chunks to a method that collects statistics before it merges."""

    @property
    def elements(self) -> int:
        """Entries of the tensor in one model."""

    def passes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the tensor: the experts' weights `(N, n)` and the base's `(n,)`, empty for weight methods."""

    def sample(self) -> Tensor:
        """`(N, s)`: task vectors (or weights) in blocks that are spread evenly over the tensor."""


class TensorStatistics(Protocol):
    """What a statistics pass has found, as the method's compiled form reads it."""

    def diagnostics(self, elements: int) -> Mapping[str, Metric]:
        """What a report shows of the tensor, once all its chunks are merged."""


@dataclass(frozen=True)
class StatisticsPass(Generic[P_contra]):
    """How a method that depends on the whole tensor through a few numbers finds them, so that it can be streamed.

    `held_share` is the share of a model's entries, for each model, that stays in memory between the passes.
    """

    collect: Callable[[P_contra, Chunks], TensorStatistics]
    held_share: float = 0.0


@dataclass(frozen=True)
class KernelInputs:
    """What the compiled form of a method is built from, beside its parameters.

    `coefficients` `(N,)` are the weights in the working dtype, `tensor` and `expert_digests` key the random streams,
    `statistics` is what the method's statistics pass has found.
    """

    weights: Weights
    coefficients: Tensor
    tensor: str
    expert_digests: tuple[str, ...] = ()
    statistics: Any = None


def weighted_sum_kernel(coefficients: Tensor) -> Kernel:
    """The kernel of Σ c_i (W_i - base)."""
    c = coefficients.contiguous().numpy()

    def kernel(stack: Floats, origin: Floats, start: int, merged: Floats) -> None:
        kernels.weigh(stack, origin, c, merged)

    return kernel


@dataclass(frozen=True)
class InnerProducts:
    """`products` `(N, N)` in float64, of weights or of task vectors."""

    products: Tensor

    def diagnostics(self, elements: int) -> Mapping[str, Metric]:
        """Nothing that a report shows."""
        return {}


def inner_products(parameters: MethodParameters, chunks: Chunks) -> InnerProducts:
    """The products of all pairs of models, summed chunk by chunk: all that slerp and Model Stock depend on."""
    products: Tensor | None = None
    for stack, origin in chunks.passes():
        part = gram(stack - origin if origin.numel() else stack)
        products = part if products is None else products.add_(part)
    return InnerProducts(torch.zeros(0, 0, dtype=torch.float64) if products is None else products)
