"""The registry: one way to call every method, what it refuses, and what its errors say."""

from __future__ import annotations

import re

import pytest
import torch

from modelweld.config.methods import METHODS, Breadcrumbs, Della, Linear, Ties
from modelweld.config.recipe import RECIPE_ADAPTER
from modelweld.errors import MergeError
from modelweld.methods import LowRank
from modelweld.methods.method import TensorContext
from modelweld.methods.registry import method, methods

CONTEXT = TensorContext("layer.0.weight", expert_digests=("d0", "d1", "d2"), experts=("sst2", "spam", "news"))


def stack(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 12, 9, generator=torch.Generator().manual_seed(0)).to(dtype)


def context(count: int) -> TensorContext:
    return TensorContext(CONTEXT.name, CONTEXT.expert_digests[:count], CONTEXT.experts[:count])


def test_every_method_of_the_configuration_is_there_and_no_other() -> None:
    assert {kind.model_fields["method"].default: kind for kind in METHODS} == {
        name: entry.parameters for name, entry in methods().items()
    }
    assert all(entry.name == name for name, entry in methods().items())


@pytest.mark.parametrize("name", sorted(methods()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_method_takes_every_float_and_leaves_its_input(name: str, dtype: torch.dtype) -> None:
    chosen = method(name)
    count = chosen.models[1] or 3
    deltas = stack(count, dtype)
    before = deltas.clone()
    merged = chosen.merge(deltas, chosen.parameters(), [1.0] * count, context=context(count))
    assert merged.shape == (12, 9)
    assert merged.dtype in (torch.float32, torch.float64)
    assert merged.isfinite().all()
    assert torch.equal(deltas, before)
    assert merged.untyped_storage().data_ptr() != deltas.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", sorted(methods()))
def test_scale_is_applied_once_and_last(name: str) -> None:
    chosen = method(name)
    count = chosen.models[1] or 3
    weights = torch.ones(count)
    plain = chosen.merge(stack(count), chosen.parameters(), weights, context=context(count))
    scaled = chosen.merge(stack(count), chosen.parameters(scale=2.5), weights, context=context(count))
    torch.testing.assert_close(scaled, plain * 2.5)


@pytest.mark.parametrize("name", sorted(name for name, entry in methods().items() if entry.elementwise))
def test_elementwise_methods_may_be_applied_chunk_by_chunk(name: str) -> None:
    chosen = method(name)
    flat = stack(3).flatten(1)
    whole = chosen.merge(flat, chosen.parameters(), [1.0] * 3, context=CONTEXT)
    for size in (1, 7, 50):
        pieces = [
            chosen.merge(
                flat[:, start : start + size],
                chosen.parameters(),
                [1.0] * 3,
                context=TensorContext(CONTEXT.name, CONTEXT.expert_digests, offset=start),
            )
            for start in range(0, flat.shape[1], size)
        ]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("name", sorted(name for name, entry in methods().items() if not entry.whole_matrix))
@pytest.mark.parametrize("shape", [(5,), (1,), (3, 2, 2, 2), (2, 0), ()])
def test_methods_that_do_not_need_a_matrix_take_any_shape(name: str, shape: tuple[int, ...]) -> None:
    chosen = method(name)
    count = chosen.models[1] or 3
    merged = chosen.merge(torch.ones(count, *shape), chosen.parameters(), [1.0] * count, context=context(count))
    assert merged.shape == shape
    assert merged.isfinite().all()


@pytest.mark.parametrize("name", sorted(name for name, entry in methods().items() if entry.whole_matrix))
def test_methods_that_need_a_matrix_say_so(name: str) -> None:
    chosen = method(name)
    for shape in ((3, 5), (3, 0, 5), (3, 2, 2, 2)):
        wanted = rf"layer\.0\.weight: needs a stack of matrices \(N, n, m\), not {re.escape(str(shape))}"
        with pytest.raises(MergeError, match=wanted):
            chosen.merge(torch.ones(shape), chosen.parameters(), [1.0] * 3, context=CONTEXT)


@pytest.mark.parametrize("name", sorted(methods()))
def test_zero_deltas_merge_to_zero(name: str) -> None:
    chosen = method(name)
    count = chosen.models[1] or 3
    merged = chosen.merge(torch.zeros(count, 6, 5), chosen.parameters(), [1.0] * count, context=context(count))
    assert not merged.any()


@pytest.mark.parametrize("name", sorted(methods()))
@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused_naming_tensor_and_model(name: str, poison: float) -> None:
    chosen = method(name)
    count = chosen.models[1] or 3
    deltas = stack(count)
    deltas[1, 0, 0] = poison
    with pytest.raises(MergeError, match=r"layer\.0\.weight, spam: holds NaN or infinite"):
        chosen.merge(deltas, chosen.parameters(), [1.0] * count, context=context(count))


def test_drm_notes_its_rank_and_the_direction_it_took() -> None:
    chosen = method("drm")
    for shape, direction in (((12, 9), "vertical"), ((9, 12), "horizontal")):
        own = context(3)
        deltas = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        chosen.merge(deltas, chosen.parameters.model_validate({"direction": "auto"}), [1.0] * 3, context=own)
        assert own.diagnostics["direction"] == direction
        assert int(own.diagnostics["rank"]) == 9
    low = context(3)
    chosen.merge_low_rank(factors(), chosen.parameters(), [1.0] * 3, context=low)
    assert int(low.diagnostics["rank"]) == 9  # 2 + 3 + 4


def test_too_few_and_too_many_models() -> None:
    with pytest.raises(MergeError, match="model_stock merges at least 2 models, not 1"):
        method("model_stock").merge(stack(1), method("model_stock").parameters(), [1.0], context=CONTEXT)
    with pytest.raises(MergeError, match="slerp merges exactly 2 models, not 3"):
        method("slerp").merge(stack(3), method("slerp").parameters(), [1.0] * 3, context=CONTEXT)
    with pytest.raises(MergeError, match="at least 1 models, not 0"):
        method("ties").merge(torch.ones(0, 4), Ties(), [], context=CONTEXT)


def test_an_unknown_method_gets_the_nearest_name() -> None:
    with pytest.raises(MergeError, match="did you mean 'task_arithmetic'"):
        method("task_arithmetics")


def test_weights_where_a_method_has_none_are_refused() -> None:
    for name in ("average", "model_stock"):
        chosen = method(name)
        with pytest.raises(MergeError, match=f"{name} takes no weights"):
            chosen.merge(stack(3), chosen.parameters(), [1.0, 2.0, 1.0], context=CONTEXT)


def test_weights_that_cancel_are_refused_where_they_are_normalised() -> None:
    with pytest.raises(MergeError, match="weights sum to zero"):
        method("linear").merge(stack(2), Linear(), [1.0, -1.0], context=CONTEXT)
    merged = method("linear").merge(stack(2), Linear(normalize=False), [1.0, -1.0], context=CONTEXT)
    torch.testing.assert_close(merged, stack(2)[0] - stack(2)[1])


def test_randomness_needs_one_digest_an_expert() -> None:
    for name in ("dare", "della"):
        with pytest.raises(MergeError, match="2 random streams for 3 models"):
            method(name).merge(stack(3), method(name).parameters(), [1.0] * 3, context=context(2))


def test_parameters_of_another_method_are_refused() -> None:
    with pytest.raises(MergeError, match="Linear are not parameters of ties"):
        method("ties").merge(stack(3), Linear(), [1.0] * 3, context=CONTEXT)


def test_a_recipe_serves_as_parameters() -> None:
    recipe = RECIPE_ADAPTER.validate_python({"method": "ties", "density": 0.5, "models": {"a": {}, "b": {}, "c": {}}})
    expected = method("ties").merge(stack(3), Ties(density=0.5), [1.0] * 3, context=CONTEXT)
    assert torch.equal(method("ties").merge(stack(3), recipe.parameters(), [1.0] * 3, context=CONTEXT), expected)


def test_settings_that_exclude_each_other_are_refused_in_the_configuration() -> None:
    with pytest.raises(ValueError, match="may be at most 1"):
        Breadcrumbs(density=0.9, gamma=0.2)
    with pytest.raises(ValueError, match="must stay within"):
        Della(drop_rate=0.05, epsilon=0.2)


LOW_RANK = sorted(name for name, entry in methods().items() if entry.low_rank)


def factors(count: int = 3) -> list[LowRank]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [LowRank(draw(20, 2 + index), draw(2 + index, 16)) for index in range(count)]


def test_the_methods_that_stay_in_the_factors() -> None:
    assert LOW_RANK == ["average", "drm", "knots", "least_interference", "linear", "task_arithmetic", "tsv_m"]


@pytest.mark.parametrize("name", LOW_RANK)
def test_factors_give_what_the_dense_matrices_give(name: str) -> None:
    chosen = method(name)
    parameters = chosen.parameters(scale=1.5)
    weights = [1.0] * 3 if name == "average" else [0.5, 1.0, 2.0]
    merged = chosen.merge_low_rank(factors(), parameters, weights, context=CONTEXT)
    dense = torch.stack([factor.dense() for factor in factors()])
    assert merged.rank <= 12
    torch.testing.assert_close(
        merged.dense(), chosen.merge(dense, parameters, weights, context=CONTEXT), rtol=1e-9, atol=1e-9
    )


def test_a_method_that_cannot_stay_low_rank_says_which_can() -> None:
    with pytest.raises(MergeError, match=r"ties does not work on low-rank factors\n.*modelweld methods"):
        method("ties").merge_low_rank(factors(), Ties(), [1.0] * 3, context=CONTEXT)
    with pytest.raises(MergeError, match="scales the base"):
        method("linear").merge_low_rank(factors(), Linear(normalize=False), [1.0] * 3, context=CONTEXT)


def test_factors_that_are_not_finite_are_refused() -> None:
    for name in LOW_RANK:
        spoilt = factors()
        spoilt[1].A[0, 0] = float("nan")
        with pytest.raises(MergeError, match=r"layer\.0\.weight, spam: holds NaN"):
            method(name).merge_low_rank(spoilt, method(name).parameters(), [1.0] * 3, context=CONTEXT)
