"""Matching, zipping, correlation and placement: against what they are defined as, on small random input."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from modelweld.errors import MergeError
from modelweld.symmetry.matching import match, match_nested
from modelweld.symmetry.placements import Clustered, Permuted
from modelweld.symmetry.similarity import Activations, correlate
from modelweld.symmetry.spec import Factor, Group, Spec
from modelweld.symmetry.zipping import zip_units


def naive_zip(
    similarities: NDArray[np.float32], models: int, beta: float, budget: float
) -> tuple[list[int], float] | None:
    """The definition: look at the whole matrix for the greatest entry, merge, and again. None when none is left."""
    matrix = similarities.astype(np.float32).copy()
    total, units = len(matrix), len(matrix) // models
    np.fill_diagonal(matrix, -np.inf)
    owner, values = list(range(total)), []
    left = [int((total - units) // models * budget + 1e-4)] * models
    for model in range(models):
        if left[model] <= 0:
            matrix[model * units : (model + 1) * units, model * units : (model + 1) * units] = -np.inf
    for _ in range(total - units):
        low, high = sorted(divmod(int(matrix.argmax()), total))
        if not np.isfinite(matrix[low, high]):
            return None
        values.append(matrix[low, high])
        row = np.minimum(matrix[low], matrix[high]) * np.float32(beta)
        row[[low, high]] = -np.inf
        matrix[low], matrix[:, low] = row, row
        matrix[high], matrix[:, high] = -np.inf, -np.inf
        owner = [low if place == high else place for place in owner]
        if low // units == high // units:
            left[low // units] -= 1
            if left[low // units] <= 0:
                own = slice(low // units * units, (low // units + 1) * units)
                matrix[own, own] = -np.inf
    order = sorted(set(owner))
    return [order.index(place) for place in owner], float(np.mean(values, dtype=np.float32))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 4),
    st.integers(1, 12),
    st.sampled_from([0.0001, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_zipping_is_what_a_search_of_the_whole_matrix_finds(
    models: int, units: int, beta: float, budget: float, coarse: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    features = generator.standard_normal((models * units, 6))
    similarity = np.corrcoef(features).reshape(models * units, models * units).astype(np.float32)
    if coarse:  # many ties
        similarity = np.round(similarity * 3) / 3
    similarity = (similarity + similarity.T) / 2
    expected = naive_zip(similarity, models, beta, budget)
    if expected is None:
        with pytest.raises(MergeError, match="no pair is left"):
            zip_units(similarity, models, beta=beta, budget=budget)
        return
    found = zip_units(similarity, models, beta=beta, budget=budget)
    assert found.cluster.tolist() == expected[0]
    assert found.value == pytest.approx(expected[1], abs=1e-6)
    assert found.sizes().min(initial=models) >= 1


def test_an_exhausted_budget_is_an_error_and_not_a_unit_merged_with_itself() -> None:
    # Three models: once unit 0 of each is one, model 2's second unit has only its own model's left.
    similarity = np.full((4, 4), -1.0, np.float32)
    similarity[:2, 2:] = similarity[2:, :2] = -np.inf
    with pytest.raises(MergeError, match="not finite"):
        zip_units(similarity, 2)
    with pytest.raises(MergeError, match="do not divide among 3"):
        zip_units(np.eye(4, dtype=np.float32), 3)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_match_is_the_best_of_all_permutations(units: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).standard_normal((units, units))
    columns, value = match(similarity)
    best = max(similarity[np.arange(units), list(order)].mean() for order in permutations(range(units)))
    assert value == pytest.approx(best)
    assert sorted(columns) == list(range(units))


def test_ties_stay_where_they_are() -> None:
    assert match(np.zeros((5, 5)))[0].tolist() == [0, 1, 2, 3, 4]
    # Units 1 and 3 are dead in both models; 0, 2 and 4 go round.
    similarity = np.zeros((5, 5))
    similarity[0, 2] = similarity[2, 4] = similarity[4, 0] = 1.0
    assert match(similarity)[0].tolist() == [2, 1, 4, 3, 0]


def test_one_outer_order_is_found_for_all_that_lies_inside() -> None:
    # Queries prefer to swap the heads by a little, values to keep them by a lot.
    keys, values = np.zeros((2, 1, 2, 1)), np.zeros((2, 1, 2, 1))
    keys[0, 0, 1, 0] = keys[1, 0, 0, 0] = 0.2
    values[0, 0, 0, 0] = values[1, 0, 1, 0] = 1.0
    assert match_nested({"keys": keys}).outer.tolist() == [1, 0]
    assert match_nested({"keys": keys, "values": values}).outer.tolist() == [0, 1]


def test_what_cannot_be_weighed_is_refused() -> None:
    with pytest.raises(MergeError, match="not finite"):
        match(np.array([[1.0, np.nan], [0.0, 1.0]]))
    with pytest.raises(MergeError, match="not square"):
        match(np.zeros((2, 3)))


@pytest.mark.parametrize("ratio", [0.0, 100.0, 1e5])
def test_streamed_correlation_keeps_its_digits_far_from_zero(ratio: float) -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((6, 900)) + 0.5 * generator.standard_normal((1, 900)) + ratio
    values[1] = -3 * values[0] + 7
    streamed = Activations()
    for part in np.split(values.astype(np.float32), [10, 11, 500], axis=1):
        streamed.add(torch.from_numpy(part))
    expected = np.corrcoef(values.astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(streamed.correlation().numpy(), expected, atol=1e-9)


def test_a_unit_that_never_varies_correlates_with_nothing() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [3.0, 2.0, 1.0]])
    streamed = Activations()
    streamed.add(values)
    for found in (streamed.correlation(), correlate(values.double())):
        torch.testing.assert_close(found[0], torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64))
        assert not found[1].any()


def test_activations_refuse_infinities_and_an_empty_set() -> None:
    streamed = Activations()
    with pytest.raises(MergeError, match="no activations"):
        streamed.correlation()
    with pytest.raises(MergeError, match="not finite"):
        streamed.add(torch.tensor([[1.0, float("inf")]]))


def heads() -> Spec:
    axis = (Factor(2, "heads"), Factor(3, "inside"))
    axes = {"out.weight": (axis, (Factor(4, None, "x"),)), "in.weight": ((Factor(4, None, "x"),), axis)}
    return Spec(
        {"heads": Group("heads", 2), "inside": Group("inside", 3, ("heads",))}, axes, frozenset({("in.weight", 1)})
    )


def test_permuted_places_keep_the_product_of_two_layers() -> None:
    spec, generator = heads(), torch.Generator().manual_seed(0)
    out, into = torch.randn(6, 4, generator=generator), torch.randn(4, 6, generator=generator)
    placed = Permuted(spec, [spec.identity(), spec.random(3)])
    moved = placed.tensor("in.weight", into, 1) @ placed.tensor("out.weight", out, 1)
    torch.testing.assert_close(moved, into @ out)
    assert placed.tensor("out.weight", out, 1, but=("heads", "inside")).equal(out)


def dense_maps(clusters: Tensor, merged: int, models: int) -> tuple[Tensor, Tensor]:
    """The definition by matrices, (models, units, merged): for what makes units, and for what reads them."""
    unmerge = torch.nn.functional.one_hot(clusters, merged).double()
    return models * unmerge / (unmerge.sum(dim=(0, 1)) + 1e-5), unmerge


def test_folding_is_the_product_with_the_dense_maps() -> None:
    factor = (Factor(5, "units"),)
    free = (Factor(4, None, "x"),)
    spec = Spec(
        {"units": Group("units", 5)},
        {"out.weight": (factor, free), "in.weight": (free, factor)},
        frozenset({("in.weight", 1)}),
    )
    clusters = torch.tensor([[0, 1, 2, 3, 3], [0, 0, 1, 4, 2], [4, 1, 1, 2, 0]])
    merge, unmerge = dense_maps(clusters, 5, 3)
    placed = Clustered(spec, [{"units": row} for row in clusters], smoothing=1e-5)
    generator = torch.Generator().manual_seed(0)
    for model in range(3):
        out = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        into = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(placed.tensor("out.weight", out, model), merge[model].T @ out)
        torch.testing.assert_close(placed.tensor("in.weight", into, model), into @ unmerge[model])


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("outer_first", [False, True])
def test_an_inside_on_an_axis_of_its_own_is_placed_as_on_a_shared_one(reads: bool, outer_first: bool) -> None:
    experts, units, free = Factor(3, "experts"), Factor(4, "units"), Factor(5, None, "x")
    groups = {"experts": Group("experts", 3), "units": Group("units", 4, ("experts",))}
    shapes = {"apart": ((experts,), (units,), (free,)), "shared": ((experts, units), (free,))}
    if not outer_first:
        shapes["apart"] = ((units,), (experts,), (free,))
    marks = frozenset({("apart", 1 if outer_first else 0), ("shared", 0)}) if reads else frozenset()
    spec, generator = Spec(groups, shapes, marks), torch.Generator().manual_seed(0)
    shared = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    apart = shared.reshape(3, 4, 5) if outer_first else shared.reshape(3, 4, 5).transpose(0, 1)

    def same(placed: Permuted | Clustered, model: int) -> None:
        found = placed.tensor("apart", apart, model)
        found = found if outer_first else found.transpose(0, 1)
        torch.testing.assert_close(found.reshape(12, 5), placed.tensor("shared", shared, model))

    same(Permuted(spec, [spec.identity(), spec.random(1)]), 1)
    # The first model's units fill every cluster, the second's fall where they may.
    clusters = [spec.random(5), {**spec.random(6), "units": torch.randint(0, 4, (3, 4), generator=generator)}]
    for model in range(2):
        same(Clustered(spec, clusters, frozenset({"experts"})), model)
