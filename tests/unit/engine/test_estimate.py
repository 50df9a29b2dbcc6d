"""What a plan says that a merge costs, beside what torch counts while it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modelweld.engine import build, open_inputs
from modelweld.engine.cost.estimate import factor_work, flops, matrix_work
from modelweld.engine.plan.records import TensorPlan
from modelweld.methods import LowRank
from modelweld.methods.method import TensorContext
from modelweld.methods.numerics.work import Work
from modelweld.methods.registry import method
from tests.support.families import recipe, write_family
from tests.support.lora import llama, write_adapter

pytest.importorskip("peft")

WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 2}
DOWN = "model.layers.0.mlp.down_proj.weight"


def planned(root: Path, name: str, tensor: str, **asked: Any) -> TensorPlan:
    asked_for = recipe(root, name, experts=2, **asked)
    with open_inputs(asked_for) as inputs:
        found: TensorPlan = next(entry for entry in build(asked_for, inputs).tensors if entry.name == tensor)
    return found


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    root = llama(tmp_path, **WIDE)
    for number, rank in enumerate((4, 12)):
        write_adapter(root / "base", root / f"e{number}", number + 1, r=rank)
    return root


def products(call: Any, **more: Any) -> int:
    with FlopCounterMode(display=False, **more) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "asked"),
    [("drm", {}), ("drm", {"direction": "vertical"}), ("knots", {}), ("tsv_m", {}), ("task_arithmetic", {})],
)
def test_the_factor_route_is_priced_by_its_ranks(adapters: Path, name: str, asked: dict[str, Any]) -> None:
    tensor = planned(adapters, name, DOWN, **asked)
    assert tensor.route == "factors"
    assert tensor.ranks == (4, 12)
    n, m = tensor.shape
    generator = torch.Generator().manual_seed(0)
    factors = [
        LowRank(torch.randn(n, rank, generator=generator).double(), torch.randn(rank, m, generator=generator).double())
        for rank in tensor.ranks
    ]
    assert tensor.parameters is not None
    chosen, context = method(name), TensorContext(DOWN, ("a", "b"), ("a", "b"))

    def merge() -> None:
        chosen.merge_low_rank(factors, tensor.parameters, [1.0, 1.0], context=context).dense()

    counted, work = products(merge), factor_work(tensor, 2)
    # QR and SVD are counted by no mode of torch, and one formula serves all subspace methods.
    assert counted / 1.5 <= work.gemm <= 2.5 * counted
    assert flops(tensor, 2) == work.total


def test_a_kept_adapter_is_never_multiplied_out(adapters: Path) -> None:
    factor = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    kept = planned(adapters, "drm", factor, output={"adapter": "keep"})
    folded = planned(adapters, "drm", DOWN)
    whole = folded.elements * 2.0 * sum(folded.ranks)
    assert flops(folded, 2) - flops(kept, 2) == pytest.approx(whole + folded.elements)


def test_factors_cost_a_fraction_of_the_dense_route(adapters: Path) -> None:
    tensor = planned(adapters, "drm", DOWN)
    assert factor_work(tensor, 2).total < matrix_work(tensor, 2).total / 10
    densified = planned(adapters, "ties", DOWN)
    assert densified.route == "densified"
    assert flops(densified, 2) == densified.elements * (2.0 * 16 + 2 * 2 + 2)


def test_the_dense_route_is_priced_as_torch_counts_it(tmp_path: Path) -> None:
    root = write_family(tmp_path, {"layers.0.weight": (256, 512)}, experts=2)
    tensor = planned(root, "drm", "layers.0.weight")
    assert tensor.parameters is not None
    stack = torch.randn(2, 256, 512, generator=torch.Generator().manual_seed(0))
    chosen, context = method("drm"), TensorContext("w", ("a", "b"), ("a", "b"))
    counted = products(lambda: chosen.merge(stack, tensor.parameters, [1.0, 1.0], context=context))
    work = matrix_work(tensor, 2)
    # The Gram matrix is symmetric, and only its lower blocks are made.
    assert counted <= work.gemm <= 2 * counted
    assert work + Work(1.0, 2.0, 3.0) == Work(work.gemm + 1, work.eigh + 2, work.entries + 3)


aten = torch.ops.aten
# What torch's counter leaves out: products in place, QR (with its Q) and Cholesky.
UNCOUNTED = {
    aten.addmm_: lambda _, a, b, **how: 2 * a[0] * a[1] * b[1],
    aten.linalg_qr: lambda a, *mode, **how: 4 * a[0] * a[1] * min(a),
    aten.linalg_cholesky_ex: lambda a, **how: a[0] ** 3 // 3,
    aten.cholesky_solve: lambda b, lower, **how: 2 * lower[0] ** 2 * b[1],
}


@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("power", [1.0, 0.75])
def test_least_interference_is_priced_by_what_it_multiplies(side: str, power: float) -> None:
    chosen, context = method("least_interference"), TensorContext("w")
    parameters = chosen.parameters(side=side, power=power, target_power=1.0)
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 256, 300), (2, 300, 256), (3, 20, 256), (3, 256, 20)):
        stack, weights = torch.randn(shape, generator=generator), [1.0] * shape[0]

        def merge(stack: torch.Tensor = stack, weights: list[float] = weights) -> None:
            chosen.merge(stack, parameters, weights, context=context)

        # A Gram matrix is symmetric, and of large ones only the lower blocks are made.
        counted, work = products(merge, custom_mapping=UNCOUNTED), chosen.matrix_work(parameters, *shape)
        assert counted / 1.01 <= work.gemm <= 1.3 * counted, shape
    factors = [LowRank(torch.randn(200, rank), torch.randn(rank, 90)) for rank in (4, 12)]

    def merge_factors() -> None:
        chosen.merge_low_rank(factors, parameters, [1.0, 1.0], context=context)

    counted = products(merge_factors, custom_mapping=UNCOUNTED)
    assert counted / 1.2 <= chosen.factor_work(parameters, 2, 16, 200, 90).gemm <= 1.3 * counted
