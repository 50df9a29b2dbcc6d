"""What a method declares is checked when it is declared, and what the engine asks of it is what it declares."""

from __future__ import annotations

import inspect
import pkgutil
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import modelweld.merging
import modelweld.methods
from modelweld.config.methods import METHODS, MethodParameters
from modelweld.methods.method import Method, TensorContext
from modelweld.methods.registry import method, methods
from modelweld.methods.streaming import InnerProducts, StatisticsPass


class Halved(MethodParameters):
    """The sum, times a share."""

    method: Literal["halved"] = "halved"
    share: float = 0.5
    seed: int = 0


def test_a_parameter_that_the_function_does_not_take_is_refused() -> None:
    def merge(deltas: Tensor, *, shares: float = 0.5, keys: Any = None) -> Tensor:
        return deltas.sum(0) * shares

    with pytest.raises(TypeError, match=r"no function of Halved: it does not take the parameter share$"):
        Method(Halved, merge, summary="")


def test_a_seed_without_random_streams_is_refused() -> None:
    def merge(deltas: Tensor, *, share: float) -> Tensor:
        return deltas.sum(0) * share

    with pytest.raises(TypeError, match="does not take the parameter seed"):
        Method(Halved, merge, summary="")


def test_a_keyword_that_nothing_fills_is_refused() -> None:
    def merge(deltas: Tensor, *, share: float, keys: Any, density: float) -> Tensor:
        return deltas.sum(0) * share

    with pytest.raises(TypeError, match="takes density, which is neither a parameter nor offered"):
        Method(Halved, merge, summary="")


def test_a_statistics_pass_without_a_compiled_form_is_refused() -> None:
    def merge(deltas: Tensor, *, share: float, keys: Any) -> Tensor:
        return deltas.sum(0) * share

    passed: StatisticsPass[Any] = StatisticsPass(lambda parameters, chunks: InnerProducts(torch.zeros(1, 1)))
    with pytest.raises(TypeError, match="halved: a statistics pass needs a host kernel"):
        Method(Halved, merge, summary="", statistics=passed)


def test_a_function_gets_its_parameters_and_what_it_asks_for() -> None:
    seen: dict[str, Any] = {}

    def merge(deltas: Tensor, *, share: float, keys: Any, weights: Any, offset: int = 7) -> Tensor:
        seen.update(share=share, keys=keys, weights=weights, offset=offset)
        return deltas.sum(0) * share

    chosen = Method(Halved, merge, summary="")
    context = TensorContext("w", ("a", "b"), offset=64)
    assert float(chosen.merge(torch.ones(2, 1), Halved(share=0.25), [1.0, 2.0], context=context)) == 0.5
    assert (seen["share"], seen["weights"], seen["offset"]) == (0.25, [1.0, 2.0], 64)
    assert len(set(seen["keys"])) == 2
    assert chosen.seeded
    assert chosen.weighted


def test_every_method_is_one_module_that_declares_itself_and_one_parameter_class() -> None:
    found = {info.name for info in pkgutil.iter_modules(modelweld.methods.__path__) if not info.ispkg}
    names = {kind.model_fields["method"].default for kind in METHODS}
    assert found - {"method", "registry", "streaming", "table"} == names == set(methods())
    assert set(modelweld.merging.__all__) == names | {"LowRank", "Method", "MethodParameters"}
    for name in names:
        assert getattr(modelweld.merging, name).METHOD is method(name)
        assert method(name).summary


def test_the_public_door_knows_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no attribute 'task_aritmetic'"):
        modelweld.merging.task_aritmetic  # noqa: B018


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_weight_method_that_says_so_keeps_equal_models(name: str) -> None:
    chosen = method(name)
    count = chosen.models[1] or 3
    if chosen.needs_base or not chosen.idempotent(chosen.parameters()):
        assert chosen.needs_base, "every weight method here is a mean of some kind"
        return
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    context = TensorContext("w", ("1", "2", "3")[:count])
    merged = chosen.merge(weight.expand(count, 6, 5), chosen.parameters(), [1.0] * count, context=context)
    torch.testing.assert_close(merged, weight, rtol=1e-12, atol=1e-12)


def test_the_engine_tests_for_no_method_by_name() -> None:
    import modelweld.engine

    concrete = {kind.__name__ for kind in METHODS}
    for info in pkgutil.walk_packages(modelweld.engine.__path__, "modelweld.engine."):
        module = __import__(info.name, fromlist=["_"])
        source = inspect.getsource(module)
        assert not [kind for kind in concrete if f"isinstance(parameters, {kind}" in source], info.name
        used = concrete & vars(module).keys()
        # What a recipe that names none gets for embeddings, and for the statistics of aligned models.
        assert used == ({"Average", "Linear", "Ties"} if info.name.endswith(".rules") else set()), info.name
