"""Every method on a real CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from modelweld.methods import LowRank
from modelweld.methods.method import TensorContext
from modelweld.methods.registry import method, methods

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def context(count: int) -> TensorContext:
    return TensorContext("layer.0.weight", tuple(f"digest{index}" for index in range(count)))


@pytest.mark.parametrize("name", sorted(methods()))
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (700, 20)])
def test_the_device_gives_what_the_cpu_gives(name: str, shape: tuple[int, int]) -> None:
    chosen = method(name)
    count = chosen.models[1] or 3
    deltas = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there = chosen.merge(deltas.cuda(), chosen.parameters(), [1.0] * count, context=context(count))
    here = chosen.merge(deltas, chosen.parameters(), [1.0] * count, context=context(count))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["drm", "least_interference", "ties"])
def test_a_model_that_did_not_train_the_weight_has_no_say(name: str) -> None:
    chosen = method(name)
    deltas = torch.randn(3, 64, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deltas[1] = 0
    there = chosen.merge(deltas.cuda(), chosen.parameters(), [1.0] * 3, context=context(3))
    here = chosen.merge(deltas, chosen.parameters(), [1.0] * 3, context=context(3))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", sorted(name for name, entry in methods().items() if entry.low_rank))
def test_the_devices_factors_give_what_the_cpus_give(name: str) -> None:
    chosen = method(name)
    generator = torch.Generator().manual_seed(1)
    factors = [
        LowRank(
            torch.randn(90, 8, generator=generator, dtype=torch.float64),
            torch.randn(8, 70, generator=generator, dtype=torch.float64),
        )
        for _ in range(3)
    ]
    there = chosen.merge_low_rank(
        [LowRank(factor.B.cuda(), factor.A.cuda()) for factor in factors],
        chosen.parameters(),
        [1.0] * 3,
        context=context(3),
    )
    here = chosen.merge_low_rank(factors, chosen.parameters(), [1.0] * 3, context=context(3))
    torch.testing.assert_close(there.dense().cpu(), here.dense(), rtol=1e-8, atol=1e-10)
