"""How rows become predictions on this machine: the device, the precision, and all else that a prediction depends on."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from modelweld.config import Evaluate
from modelweld.errors import ConfigError
from modelweld.hardware import Precision, choose_precision
from modelweld.settings import first_device

PREDICTION_VERSION = 1  # raise it when the same inputs may give other predictions


@dataclass(frozen=True)
class Settings:
    """How texts become predictions; all of it is part of the cache's key."""

    max_length: int
    batch_tokens: int
    device: str
    precision: Precision = "float32"

    def products(self) -> torch.autocast:
        """A context in which matrix products are computed in `precision`."""
        kind, half = self.device.partition(":")[0], self.precision != "float32"
        return torch.autocast(kind, getattr(torch, self.precision) if half else None, enabled=half)

    def data(self) -> dict[str, Any]:
        """What a prediction depends on besides model, tokenizer and rows."""
        return {
            "max_length": self.max_length,
            "batch_tokens": self.batch_tokens,
            "precision": self.precision,
            "device": self.device.partition(":")[0],
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "packages": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
            "code": PREDICTION_VERSION,
        }


def choose_device(wanted: str) -> str:
    """A torch device name for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`; ConfigError if it is unavailable."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise ConfigError(
            f"no device is called {wanted!r}", where="MODELWELD_DEVICE", hint="auto, cpu, cuda, cuda:<i> or mps"
        )
    count = torch.cuda.device_count() if kind == "cuda" else int(kind == "cpu" or torch.backends.mps.is_available())
    if int(index or 0) >= count:
        raise ConfigError(f"no {wanted} on this machine", where="MODELWELD_DEVICE", hint="auto takes what is there")
    return wanted


def settings_of(max_length: int, evaluate: Evaluate) -> Settings:
    """How predictions are made here: by `evaluate:` of params.yaml, on the device that MODELWELD_DEVICE names.

    The precision is the one that pays off on that device, which may not be the one that was asked for.
    """
    # A merge takes all devices of a list, one process each; an evaluation is one process.
    device = choose_device(first_device())
    return Settings(max_length, evaluate.batch_tokens, device, choose_precision(evaluate.precision, device).used)
