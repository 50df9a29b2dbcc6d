"""The closed form against SVDs of its definition, and the laws it must obey."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelweld.errors import MergeError
from modelweld.methods import LowRank, least_interference
from modelweld.methods.least_interference import factorise, finish, merge, merge_low_rank
from modelweld.methods.numerics import least_squares

SIDES = ("input", "output", "both")
EXACT = {"power": 1.0, "target_power": 1.0, "ridge": 0.0}


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def by_definition(
    deltas: Tensor, *, side: str, power: float, target_power: float, ridge: float, t: float | None, weights: list[float]
) -> Tensor:
    """The formulae of the module as they stand, through the SVD of every task vector and general solvers."""
    _, n, m = deltas.shape
    inputs, outputs, cross = torch.zeros(m, m).double(), torch.zeros(n, n).double(), torch.zeros(n, m).double()
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        used = s ** (2 * power)
        z = used.sum()
        flatter = s**target_power * s.norm() / (s**target_power).norm()
        inputs += weight * vt.mT @ torch.diag(used) @ vt / z
        outputs += weight * u @ torch.diag(used) @ u.mT / z
        cross += weight * u @ torch.diag(used * flatter) @ vt / z
    floor = max(ridge * sum(weights) / min(n, m), 1e-9 * sum(weights))
    if side == "input":
        return torch.linalg.solve(inputs + floor * torch.eye(m).double(), cross, left=False)
    if side == "output":
        return torch.linalg.solve(outputs + floor * torch.eye(n).double(), cross)
    g, p = torch.linalg.eigh(outputs)
    a, q = torch.linalg.eigh(inputs)
    x, y = 1 / (g[:, None] + floor), 1 / (a[None, :] + floor)
    mean = torch.maximum(x, y) if t is None else ((x**t + y**t) / 2) ** (1 / t)
    return p @ ((p.mT @ cross @ q) * mean) @ q.mT


stacks = st.builds(gaussian, st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 24), st.integers(1, 24))
sides = st.sampled_from(SIDES)
powers = st.sampled_from([0.0, 0.5, 0.75, 1.0, 1.3])
ts = st.sampled_from([None, 0.5, 1.0, 4.0])


@settings(max_examples=100, deadline=None)
@given(stacks, sides, powers, powers, st.sampled_from([1e-3, 0.03, 1.0]), ts, st.data())
def test_it_is_its_definition(
    deltas: Tensor, side: str, power: float, target_power: float, ridge: float, t: float | None, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 2), min_size=len(deltas), max_size=len(deltas)))
    how = {"side": side, "power": power, "target_power": target_power, "ridge": ridge, "t": t, "weights": weights}
    assert relative(merge(deltas, **how), by_definition(deltas, **how)) < 1e-8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), sides, powers, powers, st.sampled_from([0.02, 1.0]), ts)
def test_factors_give_what_the_dense_matrices_give(
    seed: int, count: int, side: str, power: float, target_power: float, ridge: float, t: float | None
) -> None:
    ranks = [1 + (seed + index) % 5 for index in range(count)]
    factors = [LowRank(gaussian(seed + i, 20, rank), gaussian(seed - i, rank, 15)) for i, rank in enumerate(ranks)]
    dense = torch.stack([factor.dense() for factor in factors])
    how = {"side": side, "power": power, "target_power": target_power, "ridge": ridge, "t": t}
    weights = [0.5 + index for index in range(count)]
    merged = merge_low_rank(factors, weights=weights, **how)
    assert merged.rank <= min(sum(ranks), 15)
    assert relative(merged.dense(), merge(dense, weights=weights, **how)) < 1e-7


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(3, 70, 5), (3, 5, 70), (1, 40, 20), (2, 12, 12)])
@pytest.mark.parametrize("power", [1.0, 0.75])
def test_weights_much_wider_than_high_are_solved_where_the_task_vectors_are(
    side: str, shape: tuple[int, int, int], power: float
) -> None:
    deltas = gaussian(0, *shape)
    how = {"side": side, "power": power, "target_power": 0.5, "ridge": 0.02, "t": 4.0, "weights": [1.0] * shape[0]}
    assert relative(merge(deltas, **how), by_definition(deltas, **how)) < 1e-9
    found = factorise(deltas, side=side)
    if shape[1] > 60 and side != "input":
        assert 15 in found.cross.shape
    if shape[2] > 60 and side != "output":
        assert 15 in found.cross.shape


class TestLimits:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 5), sides, powers, ts)
    def test_one_task_and_equal_tasks_give_that_task(
        self, seed: int, count: int, side: str, power: float, t: float | None
    ) -> None:
        delta = gaussian(seed, 12, 9)
        merged = merge(delta.expand(count, 12, 9), side=side, power=power, target_power=1.0, ridge=0.0, t=t)
        assert relative(merged, delta) < 1e-4

    def test_one_task_with_a_flatter_target_keeps_its_directions_and_its_norm(self) -> None:
        delta = gaussian(0, 12, 9)
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        flat = (u * s.sqrt() * (s.norm() / s.sqrt().norm())) @ vt
        for side in SIDES:
            merged = merge(delta[None], side=side, power=0.75, target_power=0.5, ridge=0.0)
            assert relative(merged, flat) < 1e-4
        assert relative(flat.norm(), delta.norm()) < 1e-12

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 4), powers)
    def test_tasks_of_orthogonal_inputs_add_up(self, seed: int, count: int, power: float) -> None:
        rotation = torch.linalg.qr(gaussian(seed, 20, 20)).Q
        deltas = torch.stack([gaussian(seed + i, 30, 5) @ rotation[:, 5 * i : 5 * i + 5].mT for i in range(count)])
        how = {"power": power, "target_power": 1.0, "ridge": 0.0}
        assert relative(merge(deltas, side="input", **how), deltas.sum(0)) < 1e-4
        assert relative(merge(deltas.mT, side="output", **how), deltas.sum(0).mT) < 1e-4

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 4), powers, ts)
    def test_tasks_that_share_neither_inputs_nor_outputs_add_up(
        self, seed: int, count: int, power: float, t: float | None
    ) -> None:
        left, right = torch.linalg.qr(gaussian(seed, 30, 30)).Q, torch.linalg.qr(gaussian(seed, 20, 20)).Q
        deltas = torch.stack(
            [
                left[:, 7 * i : 7 * i + 7] @ gaussian(seed + i, 7, 5) @ right[:, 5 * i : 5 * i + 5].mT
                for i in range(count)
            ]
        )
        merged = merge(deltas, side="both", power=power, target_power=1.0, ridge=0.0, t=t)
        assert relative(merged, deltas.sum(0)) < 1e-4

    @settings(max_examples=40, deadline=None)
    @given(stacks, sides, powers, powers, ts, st.floats(-3, 3).filter(lambda factor: abs(factor) > 1e-3))
    def test_the_size_of_a_task_vector_scales_what_it_contributes(
        self, deltas: Tensor, side: str, power: float, target_power: float, t: float | None, factor: float
    ) -> None:
        how = {"side": side, "power": power, "target_power": target_power, "t": t}

        def scaled(by: float) -> Tensor:
            return merge(torch.cat([deltas[:1] * by, deltas[1:]]), **how)

        contribution = scaled(2.0) - scaled(1.0)
        expected = scaled(1.0) + (factor - 1) * contribution
        assert float((scaled(factor) - expected).norm()) < 1e-8 * float(deltas.norm())

    @settings(max_examples=40, deadline=None)
    @given(stacks, sides, powers, powers, ts, st.sampled_from([1e-200, 1e-6, 0.37, 1e5, 1e200]))
    def test_scaling_all_scales_the_merge(
        self, deltas: Tensor, side: str, power: float, target_power: float, t: float | None, factor: float
    ) -> None:
        how = {"side": side, "power": power, "target_power": target_power, "t": t}
        assert relative(merge(deltas * factor, **how) / factor, merge(deltas, **how)) < 1e-9

    @settings(max_examples=40, deadline=None)
    @given(stacks, powers, powers, ts)
    def test_the_sides_are_each_others_transposes(
        self, deltas: Tensor, power: float, target_power: float, t: float | None
    ) -> None:
        how = {"power": power, "target_power": target_power, "t": t}
        assert torch.equal(merge(deltas.mT, side="output", **how), merge(deltas, side="input", **how).mT)
        assert relative(merge(deltas.mT, side="both", **how), merge(deltas, side="both", **how).mT) < 1e-8

    @settings(max_examples=30, deadline=None)
    @given(stacks, sides, powers, ts, st.randoms(use_true_random=False))
    def test_neither_order_nor_an_orthogonal_change_of_basis_matters(
        self, deltas: Tensor, side: str, power: float, t: float | None, random: object
    ) -> None:
        _, n, m = deltas.shape
        order = list(range(len(deltas)))
        random.shuffle(order)  # type: ignore[attr-defined]
        how = {"side": side, "power": power, "t": t}
        one = merge(deltas, **how)
        assert relative(merge(deltas[order], **how), one) < 1e-8
        left, right = torch.linalg.qr(gaussian(n, n, n)).Q, torch.linalg.qr(gaussian(m, m, m)).Q
        assert relative(merge(left @ deltas @ right, **how), left @ one @ right) < 1e-8

    def test_t_1_is_the_mean_of_the_one_sided_solutions(self) -> None:
        deltas = gaussian(1, 3, 14, 10)
        how = {"power": 0.75, "target_power": 0.5, "ridge": 0.02}
        mean = (merge(deltas, side="input", **how) + merge(deltas, side="output", **how)) / 2
        assert relative(merge(deltas, side="both", t=1.0, **how), mean) < 1e-10

    def test_a_large_t_comes_near_the_unbounded_one(self) -> None:
        deltas = gaussian(2, 3, 14, 10)
        far = [relative(merge(deltas, side="both", t=t), merge(deltas, side="both")) for t in (4.0, 40.0, 1e6)]
        assert far[0] > 10 * far[1] / 2 > 0
        assert far[2] < 1e-5


def loss(merged: Tensor, deltas: Tensor) -> Tensor:
    """WUDI's objective."""
    return sum(((merged - delta) @ delta.mT).square().sum() / delta.square().sum() for delta in deltas)  # type: ignore[return-value]


def conditioned(seed: int, count: int, n: int, m: int) -> Tensor:
    return gaussian(seed, count, n, m) * torch.logspace(0, -0.5, m, dtype=torch.float64)


class TestTheObjective:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**31), st.floats(1e-6, 10))
    def test_nothing_near_the_merge_is_better(self, seed: int, size: float) -> None:
        deltas = conditioned(seed, 3, 12, 9)
        best = merge(deltas, side="input", **EXACT)
        near = best + size * gaussian(seed + 1, 12, 9)
        assert loss(best, deltas) <= loss(near, deltas)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**31), st.floats(1e-6, 10), st.sampled_from([0.5, 0.75, 1.0]), st.sampled_from([0.5, 1.0]))
    def test_nor_with_powers_weights_and_a_ridge(self, seed: int, size: float, power: float, target: float) -> None:
        deltas, weights, ridge = gaussian(seed, 3, 8, 9), [0.3, 1.0, 2.0], 0.1

        def objective(merged: Tensor) -> Tensor:
            total = ridge * sum(weights) / 8 * merged.square().sum()
            for delta, weight in zip(deltas, weights, strict=True):
                u, s, vt = torch.linalg.svd(delta, full_matrices=False)
                flat = (u * (s**target * (s.norm() / (s**target).norm()))) @ vt
                total = total + weight * ((merged - flat) @ vt.mT * s**power).square().sum() / (s ** (2 * power)).sum()
            return total

        best = merge(deltas, side="input", power=power, target_power=target, ridge=ridge, weights=weights)
        assert objective(best) <= objective(best + size * gaussian(seed + 1, 8, 9))

    def test_a_long_run_of_gradient_descent_ends_there(self) -> None:
        deltas = conditioned(3, 3, 8, 6)
        best = merge(deltas, side="input", **EXACT)
        merged = deltas.sum(0).requires_grad_()
        curvature = 2 * torch.linalg.eigvalsh(sum(d.mT @ d / d.square().sum() for d in deltas))[-1]
        for _ in range(3000):
            (slope,) = torch.autograd.grad(loss(merged, deltas), merged)
            with torch.no_grad():
                merged -= slope / curvature
        assert relative(merged.detach(), best) < 1e-6
        assert relative(deltas.sum(0), best) > 0.1, "where the run began"

    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("powers", [(1.0, 1.0), (0.75, 0.5)])
    def test_what_remains_of_it_is_noted(self, side: str, powers: tuple[float, float]) -> None:
        deltas, (power, target) = gaussian(4, 3, 14, 9), powers
        notes: dict[str, Tensor] = {}
        how = {"side": side, "power": power, "target_power": target, "t": 2.0}
        merged = merge(deltas, diagnostics=notes, weights=[0.5, 1.0, 2.0], **how)
        assert torch.equal(merged, merge(deltas, weights=[0.5, 1.0, 2.0], **how)), "counting changes nothing"

        def remaining(merged: Tensor) -> float:
            found = []
            for turned in {"input": [False], "output": [True], "both": [False, True]}[side]:
                total = 0.0
                for delta, weight in zip(deltas, [0.5, 1.0, 2.0], strict=True):
                    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
                    apart = merged - (u * (s**target * (s.norm() / (s**target).norm()))) @ vt
                    seen = u.mT @ apart if turned else (apart @ vt.mT).mT
                    used = s ** (2 * power)
                    total += weight * float((used[:, None] * seen**2).sum() / used.sum())
                found.append(total)
            return sum(found) / len(found)

        assert float(notes["interference"]) == pytest.approx(remaining(merged) / remaining(0 * merged), rel=1e-9)


class TestWhoHasASay:
    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("power", [1.0, 0.75])
    def test_a_model_that_did_not_train_the_weight_has_none(self, side: str, power: float) -> None:
        a, b = gaussian(5, 2, 20, 14)
        with_idle = torch.stack([a, torch.zeros_like(a), b])
        how = {"side": side, "power": power}
        alone = merge(torch.stack([a, b]), weights=[0.5, 2.0], **how)
        assert relative(merge(with_idle, weights=[0.5, 9.0, 2.0], **how), alone) < 1e-12
        without = merge(torch.stack([a, b, b]), weights=[0.5, 2.0, 0.0], **how)
        assert relative(without, alone) < 1e-12
        notes: dict[str, Tensor] = {}
        assert not merge(torch.zeros(3, 8, 5), side=side, power=power, diagnostics=notes).any()
        assert float(notes["interference"]) == 0
        low = [LowRank(gaussian(6, 20, 3), gaussian(7, 3, 14)), LowRank(torch.zeros(20, 0), torch.zeros(0, 14))]
        assert relative(merge_low_rank(low, **how).dense(), merge_low_rank(low[:1], **how).dense()) < 1e-12

    @pytest.mark.parametrize("side", SIDES)
    def test_a_weight_counts_copies_of_a_model(self, side: str) -> None:
        a, b = gaussian(8, 2, 20, 14)
        for power in (1.0, 0.75):
            how = {"side": side, "power": power}
            twice = merge(torch.stack([a, a, b]), **how)
            assert relative(merge(torch.stack([a, b]), weights=[2.0, 1.0], **how), twice) < 1e-12
            assert relative(merge(torch.stack([a, b]), weights=torch.tensor([6.0, 3.0]), **how), twice) < 1e-12

    def test_what_does_not_train_a_direction_leaves_it_alone(self) -> None:
        deltas = gaussian(9, 2, 12, 9)
        deltas[:, :, 4:] = 0
        for side in SIDES:
            assert float(merge(deltas, side=side)[:, 4:].abs().max()) < 1e-12


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("low_rank", [False, True])
def test_a_grid_factorises_once_and_no_value_of_it_is_mistaken_for_another(
    side: str, low_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = gaussian(10, 3, 12, 9)
    factors = [LowRank(gaussian(i, 12, 3), gaussian(-i, 3, 9)) for i in range(1, 4)]
    calls, moments = [], least_squares.moments

    def counted(*operands: object, **how: object) -> object:
        calls.append(how)
        return moments(*operands, **how)  # type: ignore[arg-type]

    def run(**how: object) -> Tensor:
        return merge_low_rank(factors, **how).dense() if low_rank else merge(deltas, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(least_squares, "moments", counted)
    cache: dict[object, object] = {}
    grid = [{"ridge": ridge, "t": t} for ridge in (0.01, 0.3) for t in (None, 2.0)]
    found = [run(side=side, cache=cache, **values) for values in grid]
    assert len(calls) == 1
    others = [{"power": 0.5}, {"target_power": 0.7}, {"weights": [1.0, 2.0, 1.0]}, {"weights": torch.ones(3) * 2}]
    found += [run(side=side, cache=cache, **values) for values in others]
    assert len(calls) == 5
    monkeypatch.undo()
    for values, merged in zip([*grid, *others], found, strict=True):
        assert torch.equal(merged, run(side=side, **values))


def test_what_is_not_given_is_the_sides() -> None:
    deltas = gaussian(11, 3, 12, 9)
    for side in ("input", "output"):
        assert torch.equal(merge(deltas, side=side), merge(deltas, side=side, power=1, target_power=1, ridge=0.03))
    both = merge(deltas, side="both", power=0.75, target_power=0.5, ridge=0.02, t=None)
    assert torch.equal(merge(deltas, side="both"), both)
    assert torch.equal(merge(deltas), merge(deltas, side="input"))
    assert torch.equal(finish(factorise(deltas), ridge=0.03), merge(deltas))


def test_wrong_calls_say_what_is_wrong() -> None:
    deltas = gaussian(12, 2, 4, 4)
    with pytest.raises(MergeError, match="unknown side 'left'"):
        merge(deltas, side="left")
    for name in ("power", "target_power", "ridge"):
        for value in (-0.1, math.nan):
            with pytest.raises(MergeError, match=f"{name} is {value}"):
                merge(deltas, **{name: value})
    with pytest.raises(MergeError, match="t is 0"):
        merge(deltas, side="both", t=0.0)
    with pytest.raises(MergeError, match=r"weights are 1, -0\.5"):
        merge(deltas, weights=[1.0, -0.5])
    with pytest.raises(MergeError, match="no models"):
        merge_low_rank([])
    with pytest.raises(MergeError, match="different matrices"):
        merge_low_rank([LowRank(deltas[0], deltas[0]), LowRank(deltas[0], deltas[0][:, :2])])
    with pytest.raises(MergeError, match="use `finish`"):
        least_interference.finish_low_rank(factorise(deltas), ridge=0.03)


_PEAK = """
import sys, torch
from pathlib import Path
from modelweld.methods.least_interference import merge, working_bytes
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
torch.set_num_threads(1)
side, power, *shape = sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:])
for own in ("input", "output", "both"):
    merge(torch.randn(2, 40, 40), side=own)
deltas = torch.randn(*shape)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
merge(deltas, side=side, power=power, target_power=power)
print(resident("VmHWM") - before, working_bytes(*shape, side=side, power=power, target_power=power))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads a process's peak from Linux's /proc")
@pytest.mark.parametrize(
    ("side", "power", "shape"),
    [
        ("input", 1.0, (3, 900, 900)),
        ("output", 1.0, (2, 300, 1500)),
        ("both", 1.0, (2, 900, 700)),
        ("both", 0.75, (2, 900, 700)),
        ("both", 0.75, (2, 4000, 200)),
    ],
)
def test_the_peak_is_what_it_is_said_to_be(side: str, power: float, shape: tuple[int, int, int]) -> None:
    asked = [side, str(power), *map(str, shape)]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *asked], capture_output=True, text=True, check=True, timeout=120
    )
    peak, said = map(int, done.stdout.split())
    assert said / 3 < peak < said
