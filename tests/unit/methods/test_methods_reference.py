"""Every method but DRM against a plain numpy implementation of its definition, written apart: sorts, loops and SVDs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelweld.methods import (
    average,
    breadcrumbs,
    dare,
    della,
    iso_c,
    iso_cts,
    knots,
    least_interference,
    linear,
    model_stock,
    pcb,
    slerp,
    task_arithmetic,
    ties,
    tsv_m,
)
from modelweld.methods.numerics.rng import draws, stream_keys

Array = NDArray[np.float64]
TOLERANCE = 1e-9


def random_stack(seed: int, count: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal((count, *shape))


stacks = st.builds(
    lambda seed, count, n, m: random_stack(seed, count, n, m),
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(1, 20),
)
several = stacks.filter(lambda stack: len(stack) >= 2)
shares = st.floats(0.01, 1.0)


def coefficients(stack: Array, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(0.2, 2.0, len(stack))


def close(result: torch.Tensor, expected: Array) -> bool:
    return bool(np.linalg.norm(result.numpy() - expected) <= TOLERANCE * max(np.linalg.norm(expected), 1e-12))


def kept_largest(values: Array, share: float) -> Array:
    """Everything from the k-th smallest magnitude on, k = L - round(L share); all when k is 0."""
    k = values.size - round(values.size * share)
    limit = np.sort(np.abs(values), axis=None)[k - 1] if k > 0 else 0.0
    return np.where(np.abs(values) >= limit, values, 0.0)


def elected(stack: Array, c: Array, majority: bool = True) -> Array:
    sign = np.sign(stack.sum(0))
    if majority:
        sign = np.where(sign == 0, np.sign(sign.sum()), sign)
    agreeing = np.where(np.sign(stack) == sign, stack, 0.0)
    weighted = agreeing * c.reshape(-1, *[1] * (stack.ndim - 1))
    return weighted.sum(0) / np.maximum((weighted != 0).sum(0), 1)


def weighted_sum(stack: Array, c: Array) -> Array:
    return np.tensordot(c, stack, axes=1)


@given(stacks)
@settings(max_examples=40, deadline=None)
def test_average_linear_and_task_arithmetic(stack: Array) -> None:
    c = coefficients(stack)
    deltas = torch.from_numpy(stack)
    assert close(average.merge(deltas), stack.mean(0))
    assert close(linear.merge(deltas, weights=c.tolist()), weighted_sum(stack, c / c.sum()))
    assert close(linear.merge(deltas, weights=c.tolist(), normalize=False), weighted_sum(stack, c))
    assert close(task_arithmetic.merge(deltas, weights=c.tolist()), weighted_sum(stack, c))


@given(stacks, shares)
@settings(max_examples=80, deadline=None)
def test_ties(stack: Array, density: float) -> None:
    c = coefficients(stack)
    expected = elected(np.stack([kept_largest(delta, density) for delta in stack]), c)
    assert close(ties.merge(torch.from_numpy(stack), density=density, weights=c.tolist()), expected)


def test_ties_on_a_tensor_that_needs_the_sampled_bracket() -> None:
    stack = random_stack(3, 2, 700, 500)
    stack[0].flat[:200_000] = 0.0  # most of a model's entries untouched, as in an embedding
    expected = elected(np.stack([kept_largest(delta, 0.1) for delta in stack]), np.ones(2))
    assert close(ties.merge(torch.from_numpy(stack), density=0.1), expected)


@given(st.integers(0, 2**31), st.integers(2, 5), st.lists(st.integers(-3, 3), min_size=10, max_size=10))
@settings(max_examples=80, deadline=None)
def test_ties_where_models_cancel_exactly(seed: int, count: int, levels: list[int]) -> None:
    stack = np.random.default_rng(seed).choice(np.array(levels, dtype=float), size=(count, 6, 7))
    assert close(ties.merge(torch.from_numpy(stack), density=1.0), elected(stack, np.ones(count)))


@given(stacks, st.floats(0.0, 0.99), st.booleans(), st.sampled_from(["linear", "ties"]))
@settings(max_examples=60, deadline=None)
def test_dare(stack: Array, drop_rate: float, rescale: bool, combine: str) -> None:
    c, keys = coefficients(stack), [7 + index for index in range(len(stack))]
    result = dare.merge(
        torch.from_numpy(stack), drop_rate=drop_rate, rescale=rescale, combine=combine, weights=c.tolist(), keys=keys
    )
    dropped = min(round(drop_rate * 65536), 65535)
    uniform = np.stack(
        [splitmix_shorts(key, delta.size).reshape(delta.shape) for key, delta in zip(keys, stack, strict=True)]
    )
    kept = np.where(uniform >= dropped - 32768, stack, 0.0) * (65536 / (65536 - dropped) if rescale else 1.0)
    assert close(result, weighted_sum(kept, c) if combine == "linear" else elected(kept, c, majority=False))


def splitmix_shorts(key: int, length: int) -> NDArray[np.int16]:
    """SplitMix64 in Python's integers, as published; its 64-bit outputs cut into four shorts each."""
    mask, outputs, state = (1 << 64) - 1, [], key & ((1 << 64) - 1)
    for _ in range(-(-length // 4)):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return np.array(outputs, dtype="<u8").view("<i2")[:length]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 50), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_a_stream_is_splitmix_from_any_offset(key: int, offset: int, length: int) -> None:
    expected = splitmix_shorts(key, offset + length)[offset:]
    assert np.array_equal(draws(key, offset, length, torch.device("cpu")).numpy(), expected)


def test_streams_differ_by_seed_tensor_and_expert_and_look_uniform() -> None:
    keys = {key for seed in (0, 1) for name in ("a", "b") for key in stream_keys(seed, name, ["x", "y"])}
    assert len(keys) == 8
    assert stream_keys(3, "layer", ["x", "y"])[1:] == stream_keys(3, "layer", ["y"])
    sample = draws(stream_keys(0, "a", ["x"])[0], 0, 1 << 20, torch.device("cpu")).double()
    assert abs(float(sample.mean())) < 100
    assert abs(float((sample >= 0.9 * 65536 - 32768).double().mean()) - 0.1) < 2e-3
    assert abs(float(torch.corrcoef(torch.stack([sample[1:], sample[:-1]]))[0, 1])) < 5e-3


@given(st.integers(1, 3000), st.integers(1, 700), st.sampled_from(["linear", "ties"]))
@settings(max_examples=30, deadline=None)
def test_dare_does_not_depend_on_the_chunks(size: int, chunk: int, combine: str) -> None:
    deltas = torch.from_numpy(random_stack(size, 3, size))
    whole = dare.merge(deltas, combine=combine)
    pieces = [
        dare.merge(deltas[:, start : start + chunk], combine=combine, offset=start) for start in range(0, size, chunk)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_dare_keeps_the_expectation() -> None:
    assert abs(float(dare.merge(torch.ones(1, 1 << 20), drop_rate=0.9).mean()) - 1) < 0.02


@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_slerp(seed: int, t: float) -> None:
    stack = random_stack(seed, 2, 6, 5)
    a, b = stack
    angle = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    assert close(slerp.merge(torch.from_numpy(stack), t=t), expected)


def test_slerp_of_parallel_opposite_and_zero_weights_is_linear() -> None:
    a = torch.from_numpy(random_stack(0, 1, 4, 4)[0])
    assert close(slerp.merge(torch.stack([a, 3 * a]), weights=[3.0, 1.0]), (1.5 * a).numpy())
    assert close(slerp.merge(torch.stack([a, -a]), t=0.25), (0.5 * a).numpy())
    assert close(slerp.merge(torch.stack([a, torch.zeros_like(a)]), t=0.5), (0.5 * a).numpy())


@given(several)
@settings(max_examples=40, deadline=None)
def test_model_stock(stack: Array) -> None:
    count = len(stack)
    flat = stack.reshape(count, -1)
    cosines = [
        flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j]) for i in range(count) for j in range(i)
    ]
    cosine = max(float(np.mean(cosines)), 0.0)
    expected = count * cosine / (1 + (count - 1) * cosine) * stack.mean(0)
    assert close(model_stock.merge(torch.from_numpy(stack)), expected)


@given(stacks, st.floats(0.05, 0.9), st.floats(0.0, 0.1), st.sampled_from(["linear", "ties"]))
@settings(max_examples=60, deadline=None)
def test_breadcrumbs(stack: Array, density: float, gamma: float, combine: str) -> None:
    c = coefficients(stack)

    def pruned(delta: Array) -> Array:
        order = np.argsort(np.abs(delta), axis=None)
        top = delta.size - round(gamma * delta.size)
        first = min(max(top - round(density * delta.size), 0), max(top, 1) - 1)
        kept = np.zeros(delta.size)
        chosen = order[first : max(top, 1)]
        kept[chosen] = delta.reshape(-1)[chosen]
        return kept.reshape(delta.shape)

    kept = np.stack([pruned(delta) for delta in stack])
    result = breadcrumbs.merge(
        torch.from_numpy(stack), density=density, gamma=gamma, combine=combine, weights=c.tolist()
    )
    assert close(result, weighted_sum(kept, c) if combine == "linear" else elected(kept, c))


@given(stacks, st.floats(0.2, 0.8), st.floats(0.0, 0.3), st.booleans(), st.sampled_from(["linear", "ties"]))
@settings(max_examples=60, deadline=None)
def test_della(stack: Array, drop_rate: float, epsilon: float, rescale: bool, combine: str) -> None:
    c, keys = coefficients(stack), [11 + index for index in range(len(stack))]
    kept = np.zeros_like(stack)
    for index, delta in enumerate(stack):
        uniform = splitmix_shorts(keys[index], delta.size).reshape(delta.shape)
        for row in range(delta.shape[0]):
            for rank, column in enumerate(np.argsort(-np.abs(delta[row]), kind="stable")):
                p = drop_rate - epsilon / 2 + epsilon * rank / delta.shape[1]
                if uniform[row, column] >= p * 65536 - 32768:
                    kept[index, row, column] = delta[row, column] / (1 - p if rescale else 1)
    result = della.merge(
        torch.from_numpy(stack),
        drop_rate=drop_rate,
        epsilon=epsilon,
        rescale=rescale,
        combine=combine,
        weights=c.tolist(),
        keys=keys,
    )
    assert close(result, weighted_sum(kept, c) if combine == "linear" else elected(kept, c))


@given(stacks, st.floats(0.05, 1.0), st.sampled_from(["linear", "ties"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_knots(stack: Array, density: float, combine: str, scaled: bool) -> None:
    count, _, m = stack.shape
    c = coefficients(stack)
    left, sigma, right = np.linalg.svd(np.concatenate(list(stack), axis=1), full_matrices=False)
    blocks = [right[:, index * m : (index + 1) * m] for index in range(count)]
    if scaled:
        blocks, sigma = [sigma[:, None] * block for block in blocks], np.ones_like(sigma)
    if combine == "ties":
        # Entries of an orthogonal matrix can be equal in exact arithmetic: both sides round them alike.
        blocks = [kept_largest(np.round(block, 12), density) for block in blocks]
        merged = elected(np.stack(blocks), c)
    else:
        merged = weighted_sum(np.stack(blocks), c)
    expected = left @ (sigma[:, None] * merged)
    result = knots.merge(
        torch.from_numpy(stack),
        combine=combine,
        density=density,
        merge_scaled=scaled,
        weights=c.tolist(),
        rank_tolerance=0.0,
    )
    assert close(result, expected)


def test_knots_of_scaled_rows_is_another_merge_by_ties_and_the_same_by_the_sum() -> None:
    stack = torch.from_numpy(random_stack(3, 3, 12, 9))
    apart = knots.merge(stack, merge_scaled=True) - knots.merge(stack)
    assert float(apart.norm()) > 0.05 * float(knots.merge(stack).norm())
    linear_rows = [knots.merge(stack, combine="linear", merge_scaled=scaled) for scaled in (False, True)]
    assert close(linear_rows[0], linear_rows[1].numpy())


def nearest_orthonormal(columns: Array) -> Array:
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return left @ right


def generic(stack: Array) -> bool:
    """Enough room for every kept direction: otherwise the SVD of the concatenation has no unique polar factor."""
    return bool(min(stack.shape[1:]) >= len(stack))


@given(stacks.filter(generic), st.floats(0.0, 2.0))
@settings(max_examples=60, deadline=None)
def test_tsv_m(stack: Array, power: float) -> None:
    count, n, m = stack.shape
    c = coefficients(stack)
    kept = max(min(n, m) // count, 1)
    lefts, spectra, rights = [], [], []
    for index, delta in enumerate(stack):
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        shaped = s[:kept] ** power
        lefts.append(u[:, :kept])
        spectra.append(c[index] * shaped * s[:kept].sum() / shaped.sum())
        rights.append(vt[:kept].T)
    left = nearest_orthonormal(np.concatenate(lefts, axis=1))
    right = nearest_orthonormal(np.concatenate(rights, axis=1))
    expected = left @ np.diag(np.concatenate(spectra)) @ right.T
    assert close(tsv_m.merge(torch.from_numpy(stack), spectrum_power=power, weights=c.tolist()), expected)


@given(stacks)
@settings(max_examples=40, deadline=None)
def test_iso_c(stack: Array) -> None:
    c = coefficients(stack)
    left, sigma, right = np.linalg.svd(weighted_sum(stack, c), full_matrices=False)
    assert close(iso_c.merge(torch.from_numpy(stack), weights=c.tolist()), sigma.mean() * left @ right)


@given(stacks.filter(generic), st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_iso_cts(stack: Array, common_share: float) -> None:
    count, n, m = stack.shape
    full = min(n, m)
    c = coefficients(stack)
    specific = min(round((full - int(full * common_share)) / count), full // count)
    common = full - count * specific
    scaled = stack * c[:, None, None]
    u, s, vt = np.linalg.svd(scaled.sum(0), full_matrices=False)
    lefts, spectra, rights = [u[:, :common]], [s[:common]], [vt[:common].T]
    for delta in scaled:
        outside = delta - u[:, :common] @ u[:, :common].T @ delta
        ui, si, vti = np.linalg.svd(outside, full_matrices=False)
        lefts.append(ui[:, :specific])
        spectra.append(si[:specific])
        rights.append(vti[:specific].T)
    left = nearest_orthonormal(np.concatenate(lefts, axis=1))
    right = nearest_orthonormal(np.concatenate(rights, axis=1))
    expected = np.concatenate(spectra).mean() * left @ right.T
    result = iso_cts.merge(torch.from_numpy(stack), common_share=common_share, weights=c.tolist())
    assert close(result, expected)


@given(stacks.filter(lambda stack: stack[0].size > 3), st.floats(0.05, 0.9))
@settings(max_examples=60, deadline=None)
def test_pcb(stack: Array, density: float) -> None:
    count = len(stack)
    c = coefficients(stack)
    together = stack.sum(0)
    numerator, denominator = np.zeros_like(together), np.zeros_like(together)
    for weight, delta in zip(c, stack, strict=True):
        magnitude = np.abs(delta)
        ordered = np.sort(magnitude, axis=None)
        low, high = int(delta.size * 1e-4), int(delta.size * (1 - 1e-4) - 1)  # as the authors' code indexes them
        magnitude = np.clip(magnitude, ordered[low], ordered[high])
        unit = (magnitude - magnitude.min()) / (magnitude.max() - magnitude.min())
        score = np.exp(count * unit**2) * np.tanh(delta * together)
        first = min(delta.size - round(delta.size * density), delta.size - 1)
        floor = np.sort(score, axis=None)[first]
        if score.max() > floor:
            scale = (np.maximum(score, floor) - floor) / (score.max() - floor)
            numerator += weight * scale * np.sign(delta) * magnitude
            denominator += scale
    expected = numerator / np.maximum(denominator, 1e-12)
    assert close(pcb.merge(torch.from_numpy(stack), density=density, weights=c.tolist()), expected)


def test_pcb_clamps_outliers_of_large_tensors() -> None:
    stack = random_stack(5, 2, 300, 200)
    stack[0, 0, 0] = 1e6
    assert float(pcb.merge(torch.from_numpy(stack)).abs().max()) < 10


ORDER_FREE: dict[str, Callable[..., Any]] = {
    "average": average.merge,
    "linear": linear.merge,
    "task_arithmetic": task_arithmetic.merge,
    "ties": ties.merge,
    "model_stock": model_stock.merge,
    "breadcrumbs": breadcrumbs.merge,
    "knots": knots.merge,
    "least_interference": least_interference.merge,
    "tsv_m": tsv_m.merge,
    "iso_c": iso_c.merge,
    "iso_cts": iso_cts.merge,
    "pcb": pcb.merge,
}
# PCB's tanh and DARE's and DELLA's draws are not equivariant by definition.
SCALE_EQUIVARIANT = {name: call for name, call in ORDER_FREE.items() if name != "pcb"}


@pytest.mark.parametrize("name", sorted(ORDER_FREE))
@given(stack=several, data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_models_does_not_matter(name: str, stack: Array, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(stack))))
    result = ORDER_FREE[name](torch.from_numpy(stack))
    assert close(ORDER_FREE[name](torch.from_numpy(stack[list(order)])), result.numpy())


@pytest.mark.parametrize("name", sorted(SCALE_EQUIVARIANT))
@given(stack=several, factor=st.sampled_from([1e-4, 0.5, 3.0, 1e3]))
@settings(max_examples=25, deadline=None)
def test_scaling_every_model_scales_the_merge(name: str, stack: Array, factor: float) -> None:
    result = SCALE_EQUIVARIANT[name](torch.from_numpy(stack))
    assert close(SCALE_EQUIVARIANT[name](torch.from_numpy(stack * factor)), factor * result.numpy())


EQUAL_MODELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "average": average.merge,
    "linear": linear.merge,
    "task_arithmetic": lambda stack: task_arithmetic.merge(stack, weights=[1 / len(stack)] * len(stack)),
    "ties": lambda stack: ties.merge(stack, density=1.0),
    "slerp": lambda stack: slerp.merge(stack[:1].expand(2, *stack.shape[1:])),
    "model_stock": lambda stack: model_stock.merge(stack[:1].expand(3, *stack.shape[1:])),
    "breadcrumbs": lambda stack: breadcrumbs.merge(stack, density=1.0, gamma=0.0, combine="ties"),
    "dare": lambda stack: dare.merge(stack, drop_rate=0.0, combine="ties"),
    "della": lambda stack: della.merge(stack, drop_rate=0.0, epsilon=0.0),
    "knots": lambda stack: knots.merge(stack, density=1.0),
    "tsv_m": lambda stack: tsv_m.merge(stack, rank_share=1.0),
}


@pytest.mark.parametrize("name", sorted(EQUAL_MODELS))
@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_equal_models_merge_to_themselves(name: str, seed: int, count: int) -> None:
    one = random_stack(seed, 1, 9, 7)
    result = EQUAL_MODELS[name](torch.from_numpy(np.repeat(one, count, axis=0)))
    assert close(result, one[0])
