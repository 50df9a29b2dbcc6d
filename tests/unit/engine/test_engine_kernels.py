"""The compiled loops of a chunk give what the methods' own functions give, to the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelweld.config.methods import Average, Dare, Linear, MethodParameters, ModelStock, Slerp, TaskArithmetic, Ties
from modelweld.engine.run.chunks import in_host_memory
from modelweld.engine.run.reader import SAMPLE_BLOCK, sample_starts
from modelweld.methods.method import TensorContext
from modelweld.methods.numerics.operands import gram
from modelweld.methods.numerics.selection import magnitude_threshold
from modelweld.methods.numerics.ties_thresholds import ties_statistics
from modelweld.methods.registry import method
from modelweld.methods.streaming import InnerProducts

LENGTH = 5000  # more than one piece of a loop, and not a whole number of them
LABELS = ("a", "b", "c")


def models(seed: int, dtype: torch.dtype, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Three experts `(3, LENGTH)` and their base; with `levels`, task vectors of few values, as in half precision."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(LENGTH, generator=generator, dtype=torch.float64)
    deltas = torch.randn(3, LENGTH, generator=generator, dtype=torch.float64)
    if levels is not None:
        base, deltas = base.round(), (deltas * levels / 3).round() / 8
    deltas[:, ::7] = 0
    return (base + deltas).to(dtype), base.to(dtype)


def context(start: int = 0) -> TensorContext:
    return TensorContext("layer.weight", ("1", "2", "3"), LABELS, offset=start, finite=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.0, -2.0]])
@pytest.mark.parametrize(
    "parameters",
    [
        Linear(normalize=False),
        TaskArithmetic(scale=0.3),
        Dare(drop_rate=0.4, seed=3),
        Dare(drop_rate=0.4, seed=3, combine="ties", rescale=False),
    ],
    ids=["linear", "task_arithmetic", "dare", "dare_ties"],
)
def test_a_chunk_is_merged_as_the_method_merges_it(
    parameters: MethodParameters, weights: list[float], dtype: torch.dtype
) -> None:
    stack, base = models(0, dtype)
    origin = base if method(parameters.method).needs_base else base[:0]
    compiled = in_host_memory(parameters, weights, context(), dtype, None)
    operands = stack - origin if origin.numel() else stack
    expected = method(parameters.method).merge(operands, parameters, weights, context=context(4096))
    assert torch.equal(compiled(stack, origin, 4096), expected)


def test_a_mean_is_the_mean() -> None:
    stack, base = models(1, torch.float32)
    merged = in_host_memory(Average(), [1.0] * 3, context(), torch.float32, None)(stack, base[:0], 0)
    assert torch.allclose(merged, stack.mean(dim=0), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    density=st.sampled_from([0.001, 0.2, 0.5, 0.85, 0.999, 1.0]),
    levels=st.sampled_from([None, 1, 3, 40]),
    disjoint_mean=st.booleans(),
    weights=st.sampled_from([[1.0, 1.0, 1.0], [0.5, 2.0, 0.0]]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    misled=st.booleans(),
)
def test_ties_over_chunks_is_ties_of_the_tensor(
    seed: int,
    density: float,
    levels: int | None,
    disjoint_mean: bool,
    weights: list[float],
    dtype: torch.dtype,
    misled: bool,
) -> None:
    stack, base = models(seed, dtype, levels)
    parameters = Ties(density=density, disjoint_mean=disjoint_mean, scale=0.7)
    passes = 0

    def chunks() -> object:
        nonlocal passes
        passes += 1
        for start in range(0, LENGTH, 1024):
            yield stack[:, start : start + 1024].contiguous(), base[start : start + 1024]

    starts = sample_starts(LENGTH)
    sample = torch.cat([(stack - base)[:, start : start + SAMPLE_BLOCK] for start in starts], dim=1)
    # A sample of another scale sends the first brackets astray: the answer must not depend on it.
    known = ties_statistics(chunks, sample * 3 if misled else sample, LENGTH, density)  # type: ignore[arg-type]
    merged = in_host_memory(parameters, weights, context(), dtype, known)(stack, base, 0)
    expected = method("ties").merge(stack - base, parameters, weights, context=context())
    assert torch.equal(merged, expected)
    assert passes < 6
    kept = [delta * (delta.abs() >= magnitude_threshold(delta, density)) for delta in stack - base]
    elected = torch.stack(kept).sum(dim=0).sign()
    elected = torch.where(elected == 0, elected.sum().sign(), elected)
    left = sum(int((own != 0).sum()) for own in kept)
    outvoted = sum(int((own * elected < 0).sum()) for own in kept)
    outvoted += sum(int((own != 0)[elected == 0].sum()) for own in kept)
    notes = known.diagnostics(LENGTH)
    assert notes["kept_share"] == left / (3 * LENGTH)
    assert notes["sign_conflicts"] == pytest.approx(outvoted / max(left, 1), abs=1e-12)


@pytest.mark.parametrize(
    "parameters", [Slerp(), Slerp(t=0.3, scale=0.5), ModelStock()], ids=["slerp", "slerp_t", "model_stock"]
)
def test_what_hangs_on_inner_products_is_streamed(parameters: MethodParameters) -> None:
    stack, base = models(2, torch.float32)
    stack = stack[:2]
    deltas = stack - base if method(parameters.method).needs_base else stack
    products = sum((gram(deltas[:, start : start + 999]) for start in range(0, LENGTH, 999)), torch.zeros(2, 2))
    labelled = TensorContext("layer.weight", (), LABELS[:2], finite=True)
    origin = base if method(parameters.method).needs_base else base[:0]
    merged = in_host_memory(parameters, [1.0, 1.0], labelled, torch.float32, InnerProducts(products.double()))(
        stack, origin, 0
    )
    expected = method(parameters.method).merge(deltas, parameters, [1.0, 1.0], context=labelled)
    assert torch.allclose(merged, expected, rtol=1e-5, atol=1e-6)
