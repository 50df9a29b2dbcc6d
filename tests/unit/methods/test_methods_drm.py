"""DRM against a plain float64 SVD of its definition, and the laws it must obey."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelweld.errors import MergeError
from modelweld.methods import drm
from modelweld.methods.numerics.low_rank import LowRank
from modelweld.methods.numerics.selection import pruned


def by_definition(
    deltas: Tensor, *, drop_rate: float, weights: list[float], vertical: bool, disjoint_mean: bool, tolerance: float
) -> Tensor:
    """The paper's formulae step by step, through the SVD of the wide (or tall) matrix."""
    if vertical:
        count, n, m = deltas.shape
        left, sigma, right = torch.linalg.svd(deltas.reshape(count * n, m), full_matrices=False)
        keep = sigma > tolerance * sigma[0]
        blocks = left[:, keep].reshape(count, n, -1).mT  # (N, r, n)
        basis = right[keep].mT
    else:
        count, n, m = deltas.shape
        left, sigma, right = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
        keep = sigma > tolerance * sigma[0]
        blocks = right[keep].reshape(-1, count, m).transpose(0, 1)  # (N, r, m)
        basis = left[:, keep]
    norms = blocks.norm(dim=2, keepdim=True)
    unit = blocks / norms
    strength = sigma[keep][None, :, None] * norms
    size = unit.numel()
    k = size - round(size * (1 - drop_rate))
    threshold = unit.abs().flatten().sort().values[k - 1] if k else torch.tensor(0.0, dtype=unit.dtype)
    entries = torch.where(unit.abs() >= threshold, unit, 0) * strength
    sign = entries.sum(0).sign()
    entries = torch.where(entries.sign() == sign, entries, 0) * torch.tensor(weights, dtype=unit.dtype)[:, None, None]
    total = entries.sum(0) / ((entries != 0).sum(0).clamp(min=1) if disjoint_mean else count)
    merged = basis @ total
    return merged.mT if vertical else merged


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


stacks = st.builds(gaussian, st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 24), st.integers(1, 24))
directions = st.sampled_from(["horizontal", "vertical"])
drop_rates = st.floats(0.0, 0.99)


@settings(max_examples=150, deadline=None)
@given(stacks, directions, drop_rates, st.booleans(), st.data())
def test_it_is_its_definition(
    deltas: Tensor, direction: str, drop_rate: float, disjoint_mean: bool, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 2), min_size=len(deltas), max_size=len(deltas)))
    expected = by_definition(
        deltas,
        drop_rate=drop_rate,
        weights=weights,
        vertical=direction == "vertical",
        disjoint_mean=disjoint_mean,
        tolerance=1e-2,
    )
    result = drm.merge(deltas, direction=direction, drop_rate=drop_rate, weights=weights, disjoint_mean=disjoint_mean)
    assert relative(result, expected) < 1e-9


@settings(max_examples=50, deadline=None)
@given(stacks, drop_rates)
def test_vertical_is_horizontal_on_the_transpose(deltas: Tensor, drop_rate: float) -> None:
    vertical = drm.merge(deltas, direction="vertical", drop_rate=drop_rate)
    assert torch.equal(vertical, drm.merge(deltas.mT, direction="horizontal", drop_rate=drop_rate).mT)


@settings(max_examples=50, deadline=None)
@given(stacks, directions, drop_rates, st.randoms(use_true_random=False))
def test_the_order_of_the_models_does_not_matter(
    deltas: Tensor, direction: str, drop_rate: float, random: object
) -> None:
    order = list(range(len(deltas)))
    random.shuffle(order)  # type: ignore[attr-defined]
    one = drm.merge(deltas, direction=direction, drop_rate=drop_rate)
    assert relative(drm.merge(deltas[order], direction=direction, drop_rate=drop_rate), one) < 1e-9


@settings(max_examples=50, deadline=None)
@given(stacks, directions, st.sampled_from([1e-6, 0.37, 8.0, 1e5]))
def test_scaling_the_deltas_scales_the_merge(deltas: Tensor, direction: str, factor: float) -> None:
    one = drm.merge(deltas, direction=direction)
    assert relative(drm.merge(deltas * factor, direction=direction), one * factor) < 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), directions)
def test_equal_models_merge_to_themselves_when_nothing_is_dropped(seed: int, count: int, direction: str) -> None:
    delta = gaussian(seed, 12, 9)
    result = drm.merge(delta.expand(count, 12, 9), direction=direction, drop_rate=0.0, rank_tolerance=0.0)
    assert relative(result, delta) < 1e-9


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
class TestDegenerateInput:
    def test_a_model_that_did_not_train_the_weight_has_no_say(self, direction: str) -> None:
        a, b = gaussian(1, 2, 20, 30)
        with_idle = torch.stack([a, torch.zeros_like(a), b])
        for disjoint_mean in (True, False):
            result = drm.merge(with_idle, direction=direction, disjoint_mean=disjoint_mean, weights=[0.5, 9.0, 2.0])
            alone = drm.merge(torch.stack([a, b]), direction=direction, disjoint_mean=disjoint_mean, weights=[0.5, 2.0])
            assert relative(result, alone) < 1e-12

    def test_nobody_trained_it(self, direction: str) -> None:
        assert not drm.merge(torch.zeros(3, 8, 5), direction=direction).any()

    def test_a_drop_rate_that_drops_less_than_one_entry_keeps_all(self, direction: str) -> None:
        deltas = gaussian(2, 2, 6, 7)
        keep_all = drm.merge(deltas, direction=direction, drop_rate=0.0)
        assert torch.equal(drm.merge(deltas, direction=direction, drop_rate=1e-6), keep_all)

    def test_nothing_dropped_still_honours_the_weights(self, direction: str) -> None:
        deltas = gaussian(3, 2, 6, 7)
        one = drm.merge(deltas, direction=direction, drop_rate=0.0)
        assert relative(drm.merge(deltas, direction=direction, drop_rate=0.0, weights=[3.0, 3.0]), 3 * one) < 1e-12

    def test_opposite_models_cancel(self, direction: str) -> None:
        a = gaussian(4, 16, 10)
        assert not drm.merge(torch.stack([a, -a]), direction=direction).any()

    def test_rounding_noise_in_another_models_directions_is_no_voice(self, direction: str) -> None:
        shape = (18, 14)
        a, b = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        a[:9, :7] = gaussian(5, 9, 7)
        b[9:, 7:] = gaussian(6, 9, 7)
        clean = drm.merge(torch.stack([a, b]), direction=direction)
        noisy = drm.merge(torch.stack([a + 1e-12 * gaussian(7, *shape), b]), direction=direction)
        assert relative(noisy, clean) < 1e-8

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_halves_are_read_exactly_and_computed_in_float64(self, direction: str, dtype: torch.dtype) -> None:
        deltas = gaussian(8, 3, 12, 17).to(dtype)
        assert torch.equal(drm.merge(deltas, direction=direction), drm.merge(deltas.double(), direction=direction))

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_values_that_are_not_finite_are_refused_with_the_model_named(self, direction: str, poison: float) -> None:
        deltas = gaussian(9, 3, 5, 5)
        deltas[1, 2, 3] = poison
        with pytest.raises(MergeError, match="model 1"):
            drm.merge(deltas, direction=direction)


@pytest.mark.parametrize("shape", [(3, 700, 300), (3, 300, 700), (2, 1200, 40), (2, 40, 1200)])
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_large_weights_take_the_blocked_paths_to_the_same_result(shape: tuple[int, ...], direction: str) -> None:
    deltas = gaussian(10, *shape)
    expected = by_definition(
        deltas,
        drop_rate=0.8,
        weights=[1.0] * shape[0],
        vertical=direction == "vertical",
        disjoint_mean=True,
        tolerance=1e-2,
    )
    assert relative(drm.merge(deltas, direction=direction), expected) < 1e-9


class TestLowRank:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**31), st.lists(st.integers(1, 6), min_size=1, max_size=4), directions, st.floats(0.0, 0.95))
    def test_factors_give_what_the_dense_matrices_give(
        self, seed: int, ranks: list[int], direction: str, drop_rate: float
    ) -> None:
        factors = [LowRank(gaussian(seed + i, 30, r), gaussian(seed + 100 + i, r, 26)) for i, r in enumerate(ranks)]
        dense = torch.stack([factor.dense() for factor in factors])
        weights = [0.5 + i for i in range(len(ranks))]
        result = drm.merge_low_rank(factors, direction=direction, drop_rate=drop_rate, weights=weights)
        assert result.shape == (30, 26)
        assert result.rank <= sum(ranks)
        expected = drm.merge(dense, direction=direction, drop_rate=drop_rate, weights=weights)
        assert relative(result.dense(), expected) < 1e-9

    def test_an_adapter_that_was_never_trained_has_no_say(self) -> None:
        a, b = (LowRank(gaussian(i, 20, 4), gaussian(i + 10, 4, 15)) for i in range(2))
        idle = LowRank(torch.zeros(20, 4, dtype=torch.float64), gaussian(5, 4, 15))
        result = drm.merge_low_rank([a, idle, b]).dense()
        assert relative(result, drm.merge_low_rank([a, b]).dense()) < 1e-12

    def test_factors_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(MergeError, match="not factors of one matrix"):
            LowRank(torch.zeros(5, 2), torch.zeros(3, 5))
        with pytest.raises(MergeError, match="different matrices"):
            drm.merge_low_rank(
                [LowRank(torch.ones(5, 2), torch.ones(2, 4)), LowRank(torch.ones(5, 2), torch.ones(2, 3))]
            )
        with pytest.raises(MergeError, match="no models"):
            drm.merge_low_rank([])


def test_a_sweep_factorises_once_and_gives_what_single_merges_give() -> None:
    deltas = gaussian(11, 3, 40, 50)
    basis = drm.factorise(deltas, direction="vertical")
    for drop_rate in (0.0, 0.5, 0.9):
        for weights in (None, [1.0, 0.5, 2.0]):
            alone = drm.merge(deltas, direction="vertical", drop_rate=drop_rate, weights=weights)
            assert torch.equal(drm.finish(basis, drop_rate=drop_rate, weights=weights), alone)
            factors = drm.finish_low_rank(basis, drop_rate=drop_rate, weights=weights)
            assert relative(factors.dense(), alone) < 1e-12


def test_auto_takes_the_smaller_eigenproblem() -> None:
    assert drm.resolved_direction("auto", 10, 40) == "horizontal"
    assert drm.resolved_direction("auto", 40, 10) == "vertical"


def test_wrong_calls_say_what_is_wrong() -> None:
    deltas = gaussian(12, 2, 4, 4)
    with pytest.raises(MergeError, match="unknown direction 'sideways'"):
        drm.merge(deltas, direction="sideways")
    with pytest.raises(MergeError, match="drop_rate is 1"):
        drm.merge(deltas, drop_rate=1.0)
    with pytest.raises(MergeError, match=r"\(N, n, m\)"):
        drm.merge(deltas[0])
    with pytest.raises(MergeError, match=r"\(3,\) weights for 2 models"):
        drm.merge(deltas, weights=[1.0, 1.0, 1.0])
    with pytest.raises(MergeError, match="int64"):
        drm.merge(torch.ones(2, 3, 3, dtype=torch.int64))


_PEAKS = """
import torch
from pathlib import Path
from modelweld.methods import drm
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
torch.set_num_threads(1)
drm.merge(torch.randn(2, 40, 40))
for direction, shape in (("horizontal", (3, 900, 900)), ("vertical", (2, 400, 1600)), ("horizontal", (1, 1000, 1000))):
    deltas = torch.randn(shape)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    drm.merge(deltas, direction=direction)
    print(resident("VmHWM") - before, drm.working_bytes(*shape, direction=direction))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads a process's peak from Linux's /proc")
def test_the_peak_is_what_it_is_said_to_be() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True, timeout=120)
    peaks = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(peaks) == 3
    assert all(peak < said for peak, said in peaks)
    assert peaks[0][0] > peaks[0][1] / 3  # later ones find memory that was freed but is still the process's


@pytest.mark.parametrize("drop_rate", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0]])
@pytest.mark.parametrize("disjoint_mean", [True, False])
def test_notes_count_what_is_kept_and_what_loses_the_vote(
    drop_rate: float, weights: list[float] | None, disjoint_mean: bool
) -> None:
    basis = drm.factorise(gaussian(13, 3, 20, 30))
    notes: dict[str, Tensor] = {}
    noted = drm.finish(basis, drop_rate=drop_rate, weights=weights, disjoint_mean=disjoint_mean, diagnostics=notes)
    assert torch.equal(noted, drm.finish(basis, drop_rate=drop_rate, weights=weights, disjoint_mean=disjoint_mean)), (
        "counting changes nothing"
    )
    magnitudes = basis.directions.abs()
    size = magnitudes.numel()
    k = size - round(size * (1 - drop_rate))
    kept = magnitudes >= (magnitudes.flatten().sort().values[k - 1] if k else 0)
    entries = basis.directions * kept * basis.strengths[:, :, None]
    outvoted = kept & (entries.sign() != entries.sum(0).sign())
    assert float(notes["kept_share"]) == pytest.approx(kept.sum().item() / size)
    assert float(notes["sign_conflicts"]) == pytest.approx(outvoted.sum().item() / kept.sum().item())
    low_rank: dict[str, Tensor] = {}
    drm.finish_low_rank(basis, drop_rate=drop_rate, weights=weights, disjoint_mean=disjoint_mean, diagnostics=low_rank)
    assert low_rank == notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pruning_keeps_exactly_what_reaches_the_limit(dtype: torch.dtype) -> None:
    values = gaussian(14, 500).to(dtype)
    values[3], values[4] = -values[2], 0.0
    for limit in (values[2].abs(), values.abs().max(), torch.zeros((), dtype=dtype), torch.tensor(9.0, dtype=dtype)):
        expected = torch.where(values.abs() >= limit, values, 0)
        assert torch.equal(pruned(values, limit), expected)
        assert torch.equal(pruned(values, limit.unsqueeze(0)), expected), "as on a device, where no limit is looked at"
