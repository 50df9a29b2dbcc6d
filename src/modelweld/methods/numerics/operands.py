"""What every method asks of its operands, in one place: a floating stack, one coefficient a model, finite values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modelweld.errors import MergeError

Weights = Tensor | Sequence[float]


def stacked(deltas: Tensor, *, dtype: torch.dtype | None = None, matrices: bool = False) -> Tensor:
    """The stack `(N, *shape)` in the arithmetic's dtype: `dtype`, or else float32 for halves and as given for the rest.

    Raises MergeError for integers, an empty stack, or, with `matrices`, anything but `(N, n, m)`.
    """
    if not deltas.is_floating_point():
        raise MergeError(f"cannot merge {deltas.dtype}", hint="copy integer and bool tensors by a rule: `use: base`")
    if deltas.ndim == 0 or deltas.shape[0] == 0:
        raise MergeError(f"no models: the stack has shape {tuple(deltas.shape)}", hint="stack the models along dim 0")
    if matrices and (deltas.ndim != 3 or deltas.numel() == 0):
        raise MergeError(
            f"needs a stack of matrices (N, n, m), not {tuple(deltas.shape)}",
            hint="give this tensor another method by a rule, or see it as a matrix (out, in·kh·kw)",
        )
    if dtype is None:
        dtype = torch.float32 if deltas.dtype.itemsize < 4 else deltas.dtype
    return deltas.to(dtype)


def coefficients(weights: Weights | None, stack: Tensor) -> Tensor:
    """`(N,)` coefficients on the stack's device and in its dtype; ones when nothing was said."""
    count = stack.shape[0]
    if weights is None:
        return torch.ones(count, dtype=stack.dtype, device=stack.device)
    if not isinstance(weights, Tensor):
        weights = torch.tensor(list(weights), dtype=torch.float64)
    if weights.shape != (count,):
        raise MergeError(
            f"{tuple(weights.shape)} weights for {count} models", hint="give one weight a model, in the models' order"
        )
    return weights.to(device=stack.device, dtype=stack.dtype, non_blocking=True)


def coefficients_or_none(weights: Weights | None, stack: Tensor) -> Tensor | None:
    """As `coefficients`, but None when every weight is known to be 1, which spares the multiplications."""
    c = coefficients(weights, stack)
    ones = weights is None or (not isinstance(weights, Tensor) and all(weight == 1 for weight in weights))
    return None if ones else c


def gram(stack: Tensor) -> Tensor:
    """`(N, N)`: the inner products of the models' flattened tensors, in float64."""
    flat = stack.reshape(stack.shape[0], -1).double()
    return flat @ flat.mT


def require_finite(deltas: Tensor, names: Sequence[str] = ()) -> None:
    """Refuses NaN and infinities, naming the model.

    Looks only at tensors in host memory: a look at an accelerator's would wait for it. Whoever copies weights to a
    device has them in host memory first, and checks them there.
    """
    if deltas.device.type != "cpu" or deltas.numel() == 0:
        return
    for index, delta in enumerate(deltas):
        low, high = torch.aminmax(delta)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            model = names[index] if index < len(names) else f"model {index}"
            raise MergeError(
                "holds NaN or infinite values", where=model, hint="fix or remove this model; merging cannot repair it"
            )


def normalized(c: Tensor, weights: Weights | None, *, otherwise: str) -> Tensor:
    """Coefficients that sum to one; raises MergeError, whose hint names `otherwise`, when the weights cancel.

    `weights` are those that the coefficients come from. On a device they are not looked at, which would wait for it.
    """
    numbers = weights.tolist() if isinstance(weights, Tensor) and weights.device.type == "cpu" else weights
    if numbers is not None and not isinstance(numbers, Tensor):
        total, size = sum(numbers), sum(map(abs, numbers))
        if not (math.isfinite(size) and abs(total) > 1e-12 * size):
            listed = ", ".join(map(str, numbers))
            raise MergeError(f"the weights sum to zero ({listed})", hint=f"change a weight, or {otherwise}")
    return c / c.sum()
