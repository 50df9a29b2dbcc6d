"""A numerical check, before every alignment, that permuting by a spec preserves the model's function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelweld.errors import MergeError
from modelweld.symmetry.instances import outputs_of
from modelweld.symmetry.spec import Permutations, Spec, moves

TOLERANCE = 1e-4


def check_invariance(
    model: nn.Module, spec: Spec, inputs: Mapping[str, Any] | tuple[Any, ...], *, seed: int = 0
) -> float:
    """The relative output error under random permutations of every group (float32); at most TOLERANCE.

    Raises MergeError naming the groups that break the function when it is larger.
    """
    error = output_error(model, spec, inputs, spec.random(seed))
    if error < TOLERANCE:
        return error
    identity = spec.identity()
    guilty = []
    for name, moved in spec.random(seed).items():
        alone = {**identity, name: moved}
        if output_error(model, spec, inputs, alone) >= TOLERANCE:
            guilty.append(name)
    raise MergeError(
        f"permuting its units changes the model by {error:.1e}; groups at fault: {', '.join(guilty) or 'only jointly'}",
        where=type(model).__name__,
        hint="report the architecture; meanwhile freeze these groups in a spec file given by hand",
    )


def output_error(
    model: nn.Module, spec: Spec, inputs: Mapping[str, Any] | tuple[Any, ...], permutations: Permutations
) -> float:
    """How far these permutations move the model's outputs, relative to the largest.

    The model itself is permuted, tensor by tensor, and then put back: no second copy of it is made.
    """
    before = _outputs(model, inputs)
    _permute(model, spec, permutations)
    try:
        after = _outputs(model, inputs)
    finally:
        _permute(model, spec, spec.invert(permutations))
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if not torch.isfinite(a).all():
            raise MergeError(
                "its outputs are not finite, so nothing can be checked on them",
                where=type(model).__name__,
                hint="look for NaN or infinite weights: `modelweld stage validate` names the tensor",
            )
        scale = a.abs().max().clamp(min=1e-12)
        worst = max(worst, float((a - b).abs().max().nan_to_num(nan=torch.inf) / scale))
    return worst


def _permute(model: nn.Module, spec: Spec, permutations: Permutations) -> None:
    # Tied tensors come once: they are one object in the model.
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in spec.axes and moves(spec.axes[name]):
            tensor.data.copy_(spec.apply_to(name, tensor.data, permutations))


def _outputs(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> list[Tensor]:
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), dict(inputs))
    with torch.inference_mode():
        return [value.float().clone() for value in outputs_of(model(*args, **kwargs)).values()]
