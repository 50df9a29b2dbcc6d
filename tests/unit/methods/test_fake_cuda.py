"""No method waits for an accelerator: each runs on a fake CUDA device, where a look at a value cannot be answered.

FakeTensorMode knows shapes, dtypes and devices but no values: `.item()`, `bool(tensor)`, a shape that depends on data
or a mix of devices raises here as it would wait (or fail) on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from modelweld.engine.plan.records import Packing
from modelweld.engine.run.chunks import on_device
from modelweld.engine.run.device_stream import DeviceStream
from modelweld.engine.run.packing import merge_packed
from modelweld.methods import LowRank, drm
from modelweld.methods.method import TensorContext
from modelweld.methods.numerics.selection import _bisected, kth_smallest
from modelweld.methods.registry import method, methods

CUDA = torch.device("cuda:0")


class PlainIndexing(TorchFunctionMode):
    """Spells what asks for a device guard in plain aten calls: a CPU build of torch has no such guard for CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ == "__getitem__":
            return self.view(*args)
        if func.__name__ == "__setitem__":
            return torch.ops.aten.copy_.default(self.view(args[0], args[1]), args[2])
        if func.__name__ == "copy_":
            apart = args[0].device != args[1].device
            assert not apart or (kwargs or {}).get("non_blocking"), "a plain copy between devices is waited for"
            return torch.ops.aten.copy_.default(args[0], args[1], True)
        if func.__name__ == "contiguous":
            return torch.ops.aten.clone.default(args[0], memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def view(tensor: torch.Tensor, index: Any) -> torch.Tensor:
        dim = 0
        for part in index if isinstance(index, tuple) else (index,):
            if part is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(part, slice):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
            else:
                assert isinstance(part, int), "indexing by a tensor has a shape that depends on data"
                tensor = tensor.select(dim, part)
                continue
            dim += 1
        return tensor


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with PlainIndexing():
        yield FakeTensorMode(allow_non_fake_inputs=False)


def context(count: int) -> TensorContext:
    return TensorContext("layer.0.weight", tuple(f"digest{index}" for index in range(count)))


@pytest.mark.parametrize("name", sorted(methods()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (200, 5)])
def test_no_method_waits_for_the_device(
    fake: FakeTensorMode, name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    chosen = method(name)
    count = chosen.models[1] or 3
    with fake:
        deltas = torch.empty(count, *shape, dtype=dtype, device=CUDA)
        for weights in ([1.0] * count, torch.ones(count, device=CUDA)):
            merged = chosen.merge(deltas, chosen.parameters(), weights, context=context(count))
            assert merged.device == CUDA
            assert merged.shape == shape


OPTIONS = [
    ("linear", {"normalize": False}),
    ("ties", {"disjoint_mean": False}),
    ("dare", {"combine": "ties"}),
    ("breadcrumbs", {"combine": "ties"}),
    ("della", {"combine": "linear"}),
    ("drm", {"direction": "vertical"}),
    ("drm", {"drop_rate": 0.0, "disjoint_mean": False}),
    ("knots", {"combine": "linear"}),
    ("knots", {"merge_scaled": True}),
    ("least_interference", {"side": "output"}),
    ("least_interference", {"side": "both", "t": 4.0}),
    ("least_interference", {"side": "both", "power": 1.0, "target_power": 1.0}),
    ("tsv_m", {"spectrum_power": 0.5, "rank_share": 0.3}),
    ("slerp", {"t": 0.25}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_no_option_waits_for_the_device(fake: FakeTensorMode, name: str, options: dict[str, object]) -> None:
    chosen = method(name)
    count = chosen.models[1] or 3
    with fake:
        deltas = torch.empty(count, 24, 40, device=CUDA)
        parameters = chosen.parameters.model_validate({"method": name, **options})
        assert chosen.merge(deltas, parameters, [1.0] * count, context=context(count)).device == CUDA


@pytest.mark.parametrize("name", sorted(name for name, entry in methods().items() if entry.low_rank))
def test_no_low_rank_route_waits_for_the_device(fake: FakeTensorMode, name: str) -> None:
    chosen = method(name)
    with fake:
        factors = [LowRank(torch.empty(40, 4, device=CUDA), torch.empty(4, 24, device=CUDA)) for _ in range(3)]
        merged = chosen.merge_low_rank(factors, chosen.parameters(), [1.0] * 3, context=context(3))
        assert merged.shape == (40, 24)
        assert merged.A.device == CUDA


def test_a_sweep_does_not_wait_for_the_device(fake: FakeTensorMode) -> None:
    with fake:
        basis = drm.factorise(torch.empty(3, 40, 24, device=CUDA), direction="vertical")
        for drop_rate in (0.0, 0.5, 0.9):
            assert drm.finish(basis, drop_rate=drop_rate).device == CUDA


@pytest.mark.parametrize("name", sorted(name for name, entry in methods().items() if entry.elementwise))
def test_no_chunk_waits_on_its_way_to_the_device_and_back(fake: FakeTensorMode, name: str) -> None:
    chosen = method(name)
    with fake:
        lane = DeviceStream(CUDA)
        combine = on_device(chosen.parameters(), [1.0] * 3, context(3), lane)
        for start in (0, 4096):
            merged = combine(torch.empty(3, 4096), torch.empty(4096 if chosen.needs_base else 0), start)
            assert merged.device.type == "cpu"
            assert merged.shape == (4096,)


@pytest.mark.parametrize("name", sorted(name for name, entry in methods().items() if entry.whole_matrix))
@pytest.mark.parametrize("packing", [None, Packing(1, (16, 8, 16))])
def test_no_weight_waits_on_its_way_to_the_device_and_back(
    fake: FakeTensorMode, name: str, packing: Packing | None
) -> None:
    chosen = method(name)
    tensor = SimpleNamespace(transposed=packing is None, packing=packing)
    with fake:
        lane, whole = DeviceStream(CUDA), context(3)
        with lane.submit():
            sent = lane.to_device(torch.empty(3, 40, 24))
            merged = merge_packed(chosen, chosen.parameters(), sent, tensor, [1.0] * 3, whole)  # type: ignore[arg-type]
            assert merged.device == CUDA
            back = lane.to_host(merged)
        assert (back.device.type, back.shape) == ("cpu", (40, 24))
        if name == "drm":
            assert whole.diagnostics.keys() == {"rank", "direction", "kept_share", "sign_conflicts"}
            assert all(note.device == CUDA for note in whole.diagnostics.values() if isinstance(note, torch.Tensor))


def test_the_fake_device_does_catch_a_wait(fake: FakeTensorMode) -> None:
    with fake:
        values = torch.empty(3, device=CUDA)
        with pytest.raises(DataDependentOutputException):
            torch.ops.aten.item(values.sum())
        for look in (float, bool, lambda value: value.tolist()):
            with pytest.raises(RuntimeError):
                look(values.sum())
        with pytest.raises(RuntimeError):
            torch.masked_select(values, values > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_devices_selection_is_exact(dtype: torch.dtype) -> None:
    """The accelerators' bisection, run on the CPU beside a full sort."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[::7] = values[3]
    values[::11] = 0.0
    values[5], values[6] = 1e-40, -1e-40
    ordered = values.sort().values
    magnitudes = values.abs().sort().values
    for k in (1, 2, 450, 2500, 2501, 4999, 5000):
        assert _bisected(values, k) == ordered[k - 1] == kth_smallest(values, k)
        assert _bisected(values.abs(), torch.tensor(k)) == magnitudes[k - 1] == kth_smallest(values, k, magnitudes=True)
