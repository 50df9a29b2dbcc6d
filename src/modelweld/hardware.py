"""Which arithmetic pays off on a device: half precision is used only where it is really faster than float32.

A processor without instructions for bfloat16 still multiplies in it, fifty times slower than in float32. So a request
for half precision is checked before anything is computed: first what the hardware says about itself, then a short
measurement of both.

    choice = choose_precision("bfloat16", "cpu")
    choice.used          # "float32" where bfloat16 would be slower; a warning with both speeds was logged
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Half = Literal["bfloat16", "float16"]
Precision = Literal["float32", "bfloat16", "float16"]
Request = Literal["float32", "bfloat16", "float16", "bfloat16!", "float16!"]

FORCE = "!"
# Where the hardware does not say whether it has instructions, a lead this small may be noise.
CLEAR_LEAD = 1.2
_BUDGET_S = 0.02
_LEAST_TRIALS = 2
# Rows, inputs and outputs of the product that is timed: 17 MFLOP take 24 ms at 0.7 GFLOP/s.
_CPU_SHAPE = (128, 256, 256)
_ACCELERATOR_SHAPE = (2048, 2048, 2048)
_CPU_FLAGS: dict[Half, frozenset[str]] = {
    "bfloat16": frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}),
    "float16": frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}

_log = logging.getLogger(__name__)

Measure = Callable[[Precision, str], float]
Supports = Callable[[Half, str], bool | None]


@dataclass(frozen=True)
class PrecisionChoice:
    """What was asked for, and what is computed in. The two differ where half precision would have been slower."""

    requested: Request
    used: Precision


def choose_precision(
    requested: Request, device: str, *, measure: Measure | None = None, supports: Supports | None = None
) -> PrecisionChoice:
    """The precision to compute in on `device`; a warning with both speeds is logged where float32 replaces the request.

    Half precision is used where the hardware has instructions for it and is measured to be at least as fast as float32.
    Hardware without them gets float32 whatever the measurement says, so noise cannot change the choice there; hardware
    that does not tell must be faster by a fifth. A request that ends in `!` is taken as it is, unmeasured.
    """
    if requested == "float32":
        return PrecisionChoice(requested, "float32")
    half: Half = "bfloat16" if requested.startswith("bfloat16") else "float16"
    if requested.endswith(FORCE):
        return PrecisionChoice(requested, half)
    measure, supports = measure or gflops, supports or half_instructions
    able = supports(half, device)
    half_speed, full_speed = measure(half, device), measure("float32", device)
    if able is not False and half_speed >= full_speed * (1.0 if able else CLEAR_LEAD):
        return PrecisionChoice(requested, half)
    reason = f"{device} has no {half} instructions" if able is False else f"{half} is not faster on {device}"
    _log.warning(
        "%s: measured %.1f GFLOP/s in %s, %.1f in float32; computing in float32 (`precision: %s%s` forces %s)",
        *(reason, half_speed, half, full_speed, half, FORCE, half),
    )
    return PrecisionChoice(requested, "float32")


@cache
def half_instructions(half: Half, device: str) -> bool | None:
    """Whether this device says that it multiplies in `half`; None where it says nothing.

    Sources: the flags of /proc/cpuinfo (Linux, x86 and ARM), and the compute capability of a CUDA device.
    """
    if device.startswith("cuda"):
        import torch

        if torch.version.hip is not None:
            return None
        return torch.cuda.get_device_capability(device) >= ((8, 0) if half == "bfloat16" else (5, 3))
    return flags_name(half, _cpu_description()) if device == "cpu" else None


def flags_name(half: Half, description: str) -> bool | None:
    """Whether the text of /proc/cpuinfo names instructions for `half`; None where it lists no flags at all."""
    lines = [line.partition(":") for line in description.splitlines()]
    listed = [value.split() for key, _, value in lines if key.strip() in ("flags", "Features")]
    if not listed:
        return None
    # A processor with cores of two sorts can do what all of them can.
    return bool(_CPU_FLAGS[half] & frozenset[str].intersection(*map(frozenset, listed)))


def _cpu_description() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


@cache
def gflops(precision: Precision, device: str) -> float:
    """Measured speed of a matrix product in GFLOP/s: the fastest of as many as fit into about 20 ms.

    A processor is measured with one thread. Two threads wait for each other at every product, so beside other work
    they would show the load and not the arithmetic.
    """
    import torch

    rows, inputs, outputs = _CPU_SHAPE if device == "cpu" else _ACCELERATOR_SHAPE
    dtype = getattr(torch, precision)
    generator = torch.Generator().manual_seed(0)
    rows_in = torch.randn(rows, inputs, generator=generator).to(device, dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(device, dtype)

    def product() -> float:
        started = time.perf_counter()
        torch.nn.functional.linear(rows_in, weight)
        if device != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - started

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spent = [product()]  # the first one warms up
        while len(spent) < _LEAST_TRIALS or sum(spent) < _BUDGET_S:
            spent.append(product())
    finally:
        torch.set_num_threads(threads)
    return 2e-9 * rows * inputs * outputs / max(min(spent[1:]), 1e-9)
