"""Alignment: a permuted copy finds its way back on every architecture; what cannot be aligned is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelweld.errors import MergeError
from modelweld.symmetry import Spec, align, derive_spec, zip_models
from modelweld.symmetry.instances import example_inputs, outputs_of
from tests.support.architectures import ARCHITECTURES, build, resnet


def worst(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest relative difference of any tensor."""
    return max(
        float((tensor.double() - other[name].double()).abs().max() / tensor.double().abs().max().clamp(min=1e-9))
        for name, tensor in one.items()
    )


def outputs(model: nn.Module, state: Mapping[str, Tensor], inputs: Any) -> Tensor:
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    with torch.no_grad():
        return next(iter(outputs_of(torch.func.functional_call(model, dict(state), args, kwargs)).values()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_permuted_copy_merges_back_to_its_origin(name: str) -> None:
    model, config = build(name)
    spec = derive_spec(config)
    origin = model.state_dict()
    moved = spec.apply(origin, spec.random(3))
    assert worst(origin, moved) > 0.1
    found = align([origin, moved], spec)
    back = spec.apply(moved, found.permutations[1])
    merged = {
        name: (origin[name] + tensor) / 2 if tensor.is_floating_point() else tensor for name, tensor in back.items()
    }
    assert worst(origin, merged) <= 1e-6
    inputs = example_inputs(model)
    tied = dict(model.named_parameters()) | dict(model.named_buffers())
    merged = {name: tensor for name, tensor in merged.items() if name in tied}
    torch.testing.assert_close(outputs(model, merged, inputs), outputs(model, {}, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("norm", "width"), [(nn.BatchNorm2d, 8), (lambda width: nn.GroupNorm(4, width), 8)])
def test_a_permuted_resnet_merges_back(norm: Any, width: int) -> None:
    model, inputs = resnet(norm, width), (torch.randn(2, 3, 6, 6),)
    spec = derive_spec(model, inputs)
    origin = model.state_dict()
    for seed in range(3):
        moved = spec.apply(origin, spec.random(seed))
        back = spec.apply(moved, align([origin, moved], spec).permutations[1])
        assert worst(origin, back) <= 1e-6


@pytest.mark.parametrize("name", ["bert", "modernbert", "mixtral"])
def test_three_models_come_to_the_first_and_zipping_copies_gives_the_original(name: str) -> None:
    model, config = build(name)
    spec, origin = derive_spec(config), model.state_dict()
    states = [origin, spec.apply(origin, spec.random(1)), spec.apply(origin, spec.random(2))]
    for state, moved in zip(states, align(states, spec).permutations, strict=True):
        assert worst(origin, spec.apply(state, moved)) <= 1e-6
    zipped = zip_models(states, spec, beta=1.0)
    merged = {
        name: torch.stack([zipped.placed.tensor(name, s[name].double(), i) for i, s in enumerate(states)]).mean(0)
        for name in origin
    }
    inputs = example_inputs(model)
    merged = {name: tensor.to(origin[name].dtype) for name, tensor in merged.items()}
    # Merged units stand in another order; the function is the same.
    torch.testing.assert_close(outputs(model, merged, inputs), outputs(model, {}, inputs), rtol=1e-4, atol=1e-5)


def test_finetunes_of_one_base_stay_where_they_are() -> None:
    model, config = build("bert")
    spec, origin = derive_spec(config), model.state_dict()
    torch.manual_seed(1)
    tuned = {name: tensor + 0.05 * tensor.std() * torch.randn_like(tensor) for name, tensor in origin.items()}
    found = align([origin, tuned], spec)
    assert found.identity_share() == 1.0


def test_dead_units_do_not_move() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    spec = derive_spec(model, (torch.randn(2, 4),))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("0.weight", "0.bias"):
        state[name][3:] = 0
    state["2.weight"][:, 3:] = 0
    found = align([state, {name: tensor.clone() for name, tensor in state.items()}], spec)
    assert found.permutations[1]["0.weight[0]"].tolist() == list(range(6))


def test_the_trace_rises_and_the_same_seed_gives_the_same_alignment() -> None:
    model, config = build("vit")
    spec = derive_spec(config)
    other = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    first, second = (align([model.state_dict(), other], spec, seed=5) for _ in range(2))
    assert first.trace == second.trace
    assert first.objective == max(first.trace)
    for name, moved in first.permutations[1].items():
        assert moved.equal(second.permutations[1][name])


def test_another_width_or_depth_is_refused_by_the_first_differing_layer() -> None:
    model, config = build("bert")
    spec, state = derive_spec(config), model.state_dict()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    with pytest.raises(MergeError, match=r"layer\.0\.intermediate.*shape \(48, 32\) in model 0, \(40, 32\) in model 1"):
        align([state, {**state, name: torch.zeros(40, 32)}], spec)
    shallow = {name: tensor for name, tensor in state.items() if ".layer.1." not in name}
    with pytest.raises(MergeError, match=r"encoder\.layer\.1\..*model 1 has no such tensor"):
        align([state, shallow], spec)
    with pytest.raises(MergeError, match=r"encoder\.layer\.1\..*only model 1 has"):
        align([shallow, state], spec)


def test_nonsense_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(MergeError, match=r"alpha is 1\.5"):
        align([model.state_dict()] * 2, Spec({}, {}), alpha=1.5)
    with pytest.raises(MergeError, match="two models"):
        align([model.state_dict()], Spec({}, {}))


def test_zip_budgets_that_leave_no_pair_are_refused_by_the_group() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    spec = derive_spec(model, (torch.randn(2, 4),))
    generator = torch.Generator().manual_seed(0)
    states = [
        {name: torch.randn(tensor.shape, generator=generator) for name, tensor in model.state_dict().items()}
        for _ in range(3)
    ]
    assert zip_models(states, spec).objective > 0.0
    with pytest.raises(MergeError, match=r"group 0\.weight\[0\]: no pair is left to merge after \d+ of 32"):
        zip_models(states, spec, budget=0.0)
