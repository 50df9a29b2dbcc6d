"""Batch statistics of a merged model: averaged weights give other activations than any of the parents.

Source: REPAIR (arXiv 2211.08403): for networks with BatchNorm it recomputes the running statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from modelweld.errors import MergeError


def repair(model: nn.Module, batches: Iterable[Mapping[str, Any] | tuple[Any, ...]]) -> int:
    """Recompute every BatchNorm's running mean and variance over `batches`; returns the number of layers.

    Works for BatchNorm1d, 2d and 3d, in place; all else of the model stays in evaluation mode. Each batch has the same
    weight. Raises MergeError for an empty loader and for statistics that are not finite.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not layers:
        return 0
    momenta = [layer.momentum for _, layer in layers]
    model.eval()
    for _, layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over the batches
        layer.train()
    seen = 0
    try:
        with torch.no_grad():
            for batch in batches:
                args, kwargs = (batch, {}) if isinstance(batch, tuple) else ((), dict(batch))
                model(*args, **kwargs)
                seen += 1
    finally:
        for (_, layer), momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
    if not seen:
        raise MergeError("no batch to compute BatchNorm statistics from", hint="give a few hundred rows")
    for name, layer in layers:
        for statistic in (layer.running_mean, layer.running_var):
            if statistic is not None and not torch.isfinite(statistic).all():
                raise MergeError("its new statistics are not finite", where=name, hint="look for overflow in the merge")
    return len(layers)
