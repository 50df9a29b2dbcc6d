"""Derived symmetries: valid for every architecture, nested where attention is, and exact to undo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from modelweld.errors import MergeError
from modelweld.symmetry import Spec, check_invariance, derive_spec
from modelweld.symmetry.instances import example_inputs
from tests.support.architectures import ARCHITECTURES, build, resnet


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_derived_groups_keep_the_function_and_find_every_kind_of_unit(name: str) -> None:
    model, config = build(name)
    spec = derive_spec(config)
    assert spec.unknown == {}
    assert {group.size for group in spec.groups.values()} >= ARCHITECTURES[name][3]
    assert check_invariance(model, spec, example_inputs(model)) < 1e-4


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "qwen3"])
def test_permutations_can_be_undone_and_composed(name: str) -> None:
    model, config = build(name)
    spec, state = derive_spec(config), model.state_dict()
    first, second = spec.random(1), spec.random(2)
    moved = spec.apply(state, first)
    assert any(not moved[key].equal(state[key]) for key in state)
    back = spec.apply(moved, spec.invert(first))
    twice, once = spec.apply(moved, second), spec.apply(state, spec.compose(first, second))
    for key, tensor in state.items():
        assert back[key].equal(tensor), key
        assert once[key].equal(twice[key]), key


def test_every_head_has_an_inside_of_its_own() -> None:
    _, config = build("bert")
    spec = derive_spec(config)
    inner = spec.groups["bert.encoder.layer.0.attention.self.query.weight[0.1]"]
    assert inner.within == ("bert.encoder.layer.0.attention.self.query.weight[0.0]",)
    assert spec.random(0)[inner.name].shape == (4, 8)


def test_a_query_norm_shared_by_heads_shares_their_inside() -> None:
    # Qwen3's q_norm has one gain a head dimension; RoPE freezes the queries' own anyway.
    _, config = build("qwen3")
    spec = derive_spec(config)
    assert all(factor.group is None for factor in spec.axes["model.layers.0.self_attn.q_norm.weight"][0])


def test_keys_and_values_of_a_group_move_before_the_queries_in_it() -> None:
    _, config = build("llama")
    spec = derive_spec(config)
    query = spec.axes["model.layers.0.self_attn.q_proj.weight"][0]
    key = spec.axes["model.layers.0.self_attn.k_proj.weight"][0]
    assert query[0].group == key[0].group
    assert spec.groups[str(query[1].group)].within == (query[0].group,)
    assert query[2].group is None


def test_experts_move_with_their_router_and_each_has_an_inside_of_its_own() -> None:
    model, config = build("mixtral")
    spec, layer = derive_spec(config), "model.layers.0.mlp"
    (router,), _ = spec.axes[f"{layer}.gate.weight"]
    experts, packed, _ = spec.axes[f"{layer}.experts.gate_up_proj"]
    assert experts == (router,) == spec.axes[f"{layer}.experts.down_proj"][0]
    pieces, units = packed
    assert (pieces.size, pieces.group) == (2, None)
    assert spec.axes[f"{layer}.experts.down_proj"][2] == (units,)
    assert spec.groups[str(units.group)].within == (router.group,)
    moved, state = spec.random(0), model.state_dict()
    down = spec.apply(state, {**spec.identity(), **{str(g.group): moved[str(g.group)] for g in (router, units)}})
    order = moved[str(router.group)]
    assert order.tolist() != list(range(6))
    for place, expert in enumerate(order):
        expected = state[f"{layer}.experts.down_proj"][expert][:, moved[str(units.group)][place]]
        assert down[f"{layer}.experts.down_proj"][place].equal(expected)


class Routed(nn.Module):
    """Experts of which two are run for each row; `mixed` also runs the mean of all, whose units are all experts'."""

    def __init__(self, mixed: bool, top: int = 2) -> None:
        super().__init__()
        self.mixed, self.top = mixed, top
        self.stem, self.router, self.head = nn.Linear(5, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        weights, chosen = self.router(x).softmax(-1).topk(self.top, dim=-1)
        up, down = self.up[chosen.reshape(-1)], self.down[chosen.reshape(-1)]
        rows = x.repeat_interleave(self.top, dim=0)
        hidden = torch.relu(torch.bmm(up, rows.unsqueeze(-1)))
        if self.mixed:
            hidden = hidden * (rows @ self.up.mean(0).T).unsqueeze(-1)
        out = torch.bmm(down, hidden).squeeze(-1) * weights.reshape(-1, 1)
        return self.head(out.view(len(x), self.top, 8).sum(1))


@pytest.mark.parametrize(("mixed", "top", "nested"), [(False, 2, True), (True, 2, False), (False, 1, False)])
def test_units_that_experts_share_are_not_taken_apart(mixed: bool, top: int, nested: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Routed(mixed, top).eval(), (torch.randn(7, 5),)
    spec = derive_spec(model, inputs)
    experts, units = spec.axes["up"][0][0], spec.axes["up"][1][0]
    assert experts == spec.axes["router.weight"][0][0]
    assert experts.group is not None
    assert spec.groups[str(units.group)].within == ((experts.group,) if nested else ())
    assert check_invariance(model, spec, inputs) < 1e-4


class Numbered(Routed):
    """Experts whose numbers are also numbers."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(torch.relu(self.stem(x))).topk(self.top, dim=-1)[1]
        return super().forward(x) + chosen.float().mean(dim=1, keepdim=True)


def test_positions_that_are_computed_with_pin_their_axis() -> None:
    model, inputs = Numbered(False), (torch.randn(7, 5),)
    why = derive_spec(model, inputs).axes["router.weight"][0][0].why
    assert why is not None
    assert "positions" in why


def test_a_spec_survives_its_file() -> None:
    _, config = build("t5")
    spec = derive_spec(config)
    assert Spec.from_json(spec.to_json()) == spec


def test_a_resnets_running_statistics_move_with_their_channels() -> None:
    model, inputs = resnet(nn.BatchNorm2d), (torch.randn(2, 3, 6, 6),)
    spec = derive_spec(model, inputs)
    assert spec.axes["1.running_mean"] == spec.axes["1.weight"]
    assert len(spec.groups) == 3
    assert check_invariance(model, spec, inputs) < 1e-4


def test_group_norm_moves_groups_and_then_channels_inside_them() -> None:
    model, inputs = resnet(lambda width: nn.GroupNorm(4, width)), (torch.randn(2, 3, 6, 6),)
    spec = derive_spec(model, inputs)
    outer, inner = spec.axes["0.weight"][0]
    assert (outer.size, inner.size) == (4, 2)
    assert spec.groups[str(inner.group)].within == (outer.group,)
    assert check_invariance(model, spec, inputs) < 1e-4


class Packed(nn.Module):
    """Attention with one projection for queries, keys and values, as timm's ViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.proj(mixed.transpose(1, 2).reshape(batch, length, width)))


def test_a_packed_projection_keeps_its_pieces_and_moves_its_heads() -> None:
    torch.manual_seed(0)
    model, inputs = Packed().eval(), (torch.randn(2, 5, 16),)
    spec = derive_spec(model, inputs)
    (packed,) = spec.axes["qkv.weight"][0]
    query, key, value = packed.parts
    assert query == key
    assert query[0] == value[0]
    assert query[1] != value[1]
    assert spec.axes["proj.weight"][1] == value
    assert spec.groups[str(value[1].group)].within == (value[0].group,)
    # The pieces keep their order.
    query_order, value_order = (spec.index((packed,), spec.random(1))[a:b] for a, b in ((0, 16), (32, 48)))
    assert sorted(query_order.tolist()) == list(range(16))
    assert sorted(value_order.tolist()) == list(range(32, 48))
    assert check_invariance(model, spec, inputs) < 1e-4


class Mixing(nn.Module):
    """Pieces of one projection that are weighed against each other, unit by unit, before they are told apart."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        self.mix, self.packed, self.head = mix, nn.Linear(6, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.packed(x).reshape(len(x), 3, 8)
        if self.mix == "softmax":
            pieces = pieces.softmax(1)
        elif self.mix == "cumsum":
            pieces = pieces.cumsum(1)
        elif self.mix == "flip":
            pieces = pieces.flip(1)
        elif self.mix == "norm":
            pieces = nn.functional.layer_norm(pieces.transpose(1, 2), (3,)).transpose(1, 2)
        one, two, three = pieces.unbind(1)
        return self.head(one * two) + three.sum(-1, keepdim=True)


@pytest.mark.parametrize("mix", ["none", "softmax", "cumsum", "flip", "norm"])
def test_pieces_that_meet_unit_by_unit_are_not_taken_apart(mix: str) -> None:
    torch.manual_seed(0)
    model, inputs = Mixing(mix).eval(), (torch.randn(5, 6),)
    spec = derive_spec(model, inputs)
    assert bool(spec.axes["packed.weight"][0][-1].parts) == (mix == "none")
    assert {group.size for group in spec.groups.values()} == {8}
    assert check_invariance(model, spec, inputs) < 1e-4


class Odd(nn.Module):
    """A module with an operation that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(torch.logcumsumexp(self.one(x), dim=-1))))


def test_an_unknown_operation_freezes_what_it_touches_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, inputs = Odd().eval(), (torch.randn(4, 6),)
    spec = derive_spec(model, inputs)
    assert dict(spec.unknown) == {"logcumsumexp": 1}
    assert spec.axes["one.weight"][0][0].why == "unknown operation logcumsumexp"
    assert spec.axes["two.weight"][0][0].group == "two.weight[0]"
    assert check_invariance(model, spec, inputs) < 1e-4


def test_a_wrong_spec_is_refused_naming_the_group() -> None:
    model, inputs = Odd().eval(), (torch.randn(4, 6),)
    spec = derive_spec(model, inputs)
    free: Mapping[str, Any] = dict(spec.axes) | {"one.weight": (spec.axes["two.weight"][0], spec.axes["one.weight"][1])}
    wrong = Spec(spec.groups, free)
    with pytest.raises(MergeError, match=r"two\.weight\[0\]"):
        check_invariance(model, wrong, inputs)


class Branching(nn.Module):
    """Control flow on data cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if float(x.sum()) > 0 else x


def test_a_model_that_cannot_be_exported_is_refused_by_name_and_operation() -> None:
    with pytest.raises(
        MergeError, match=r"Branching: cannot be exported.*`return self\.one\(x\) if float\(x\.sum"
    ) as error:
        derive_spec(Branching(), (torch.randn(2, 4),))
    assert "align: {spec: FILE}" in str(error.value.hint)


def test_a_config_that_its_own_class_refuses_is_refused() -> None:
    config = hf.ReformerConfig(architectures=["ReformerModelWithLMHead"], is_decoder=False)
    with pytest.raises(MergeError, match=r"ReformerConfig: cannot be built from its config.*is_decoder=True"):
        derive_spec(config)


def test_weights_that_are_not_finite_prove_nothing() -> None:
    model, inputs = resnet(nn.BatchNorm2d), (torch.randn(2, 3, 6, 6),)
    spec = derive_spec(model, inputs)
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    with pytest.raises(MergeError, match="not finite"):
        check_invariance(model, spec, inputs)


def test_a_proof_leaves_the_model_as_it_was() -> None:
    model, config = build("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert check_invariance(model, derive_spec(config), example_inputs(model)) > 0.0
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
