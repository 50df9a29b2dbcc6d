"""Activations are seen where units are taken in, by group and in the spec's order; batch statistics are made anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

from modelweld.errors import MergeError
from modelweld.symmetry import align, derive_spec, similarity
from modelweld.symmetry.observing import hook_points, observe
from modelweld.symmetry.repair import repair
from modelweld.symmetry.similarity import between

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def vit(seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1)
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pictures(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(8, 1, 8, 8, generator=generator)} for _ in range(count)]


def test_every_kind_of_unit_of_a_vit_is_seen() -> None:
    model = vit(0)
    spec = derive_spec(model)
    found = observe([model, vit(1)], spec, pictures())
    units = {
        name: group.size * (spec.groups[group.within[0]].size if group.within else 1)
        for name, group in spec.groups.items()
    }
    # Heads have no activation of their own: what lies inside them has.
    heads = {group.within[0] for group in spec.groups.values() if group.within}
    assert set(found) == set(units) - heads
    assert all(found[name].shape == (2 * units[name], 2 * units[name]) for name in found)


def test_a_permuted_copy_is_found_by_its_activations_alone() -> None:
    model, other = vit(0), vit(0)
    spec = derive_spec(model)
    moved = spec.random(3)
    other.load_state_dict(spec.apply(model.state_dict(), moved))
    found = align(
        [model.state_dict(), other.state_dict()], spec, observe([model, other], spec, pictures()), alpha=0.0
    )  # fmt: skip
    back = spec.apply(other.state_dict(), found.permutations[1])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back[name], tensor, msg=name)


def test_correlation_is_that_of_the_layers_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)).eval()
    batches = [(torch.randn(9, 5),), (torch.randn(6, 5),)]
    spec = derive_spec(model, batches[0])
    (group,) = spec.groups
    with torch.no_grad():
        hidden = torch.cat([model[1](model[0](batch[0])) for batch in batches])
    # A unit that never fires correlates with nothing.
    wanted = torch.corrcoef(hidden.double().T).nan_to_num(0.0)
    torch.testing.assert_close(observe([model], spec, batches)[group], wanted)
    assert [(place.module, place.reads) for place in hook_points(model, spec)] == [("2", True)]


def test_padding_is_left_out() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, vocab_size=30, max_position_embeddings=16), add_pooling_layer=False).eval()
    spec = derive_spec(model)
    ids = torch.randint(0, 30, (4, 6))
    mask = torch.tensor([[1] * 6, [1] * 6, [1] * 6, [1, 1, 1, 0, 0, 0]])
    padded = ids.masked_fill(mask == 0, 0)
    elsewise = ids.masked_fill(mask == 0, 29)
    # Nothing attends to a masked position, so what stands there must not matter.
    first, second = (
        observe([model], spec, [{"input_ids": given, "attention_mask": mask}]) for given in (padded, elsewise)
    )
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_sums_on_disk_are_those_in_memory(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Strips of a few rows, and parts of a batch.
    monkeypatch.setattr(similarity, "STRIP_BYTES", 1000)
    monkeypatch.setattr(similarity, "SAMPLES", 7)
    models = [vit(0), vit(1), vit(2)]
    spec = derive_spec(models[0])
    stored = observe(models, spec, pictures(), whole=whole, scratch=tmp_path)
    held = observe(models, spec, pictures(), whole=whole)
    assert list(stored) == list(held)
    assert list(tmp_path.iterdir())
    for name, expected in held.items():
        torch.testing.assert_close(stored[name], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(stored[name], expected, rtol=0, atol=1e-12)


def test_rows_of_the_first_model_are_a_part_of_the_whole() -> None:
    models = [vit(0), vit(1), vit(2)]
    spec = derive_spec(models[0])
    whole, part = observe(models, spec, pictures()), observe(models, spec, pictures(), whole=False)
    for name, found in part.items():
        units = len(found)
        torch.testing.assert_close(found, whole[name][:units, units:])
        for model in (1, 2):
            assert between(found, units, model).equal(found[:, (model - 1) * units : model * units])
            torch.testing.assert_close(between(whole[name], units, model), between(found, units, model))


def test_an_activation_that_is_not_finite_is_refused_by_its_group() -> None:
    model, other = vit(0), vit(1)
    spec = derive_spec(model)
    with torch.no_grad():
        other.vit.layers[1].mlp.fc1.weight.fill_(torch.inf)
    with pytest.raises(MergeError, match=r"the units of vit\.layers\.1\.mlp\.fc1\.weight\[0\]: an activation is not"):
        observe([model, other], spec, pictures())


def test_an_empty_calibration_set_is_refused() -> None:
    model = vit(0)
    with pytest.raises(MergeError, match="calibration set is empty"):
        observe([model], derive_spec(model), [])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_batch_statistics_become_those_of_the_data(dims: int) -> None:
    norm: nn.Module = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4, momentum=0.3)
    model = nn.Sequential(norm, nn.Dropout(0.9))
    model[0].running_mean.fill_(7.0)
    data = [(torch.randn(32, 4, *[3] * (dims if dims > 1 else 0)) * 2 + 5,) for _ in range(4)]
    assert repair(model, data) == 1
    every = torch.stack([batch[0].transpose(0, 1).flatten(1).mean(1) for batch in data])
    torch.testing.assert_close(model[0].running_mean, every.mean(0))
    assert (model[0].running_var - 4.0).abs().max() < 1.0
    assert model[0].momentum == 0.3
    assert not any(module.training for module in model.modules())


def test_no_batch_and_no_norm() -> None:
    def nothing() -> Iterator[tuple[Tensor]]:
        yield from ()

    with pytest.raises(MergeError, match="no batch"):
        repair(nn.Sequential(nn.BatchNorm1d(3)), nothing())
    assert repair(nn.Sequential(nn.Linear(3, 3)), nothing()) == 0


def test_statistics_that_overflow_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(MergeError, match="1: its new statistics are not finite"):
        repair(model, [(torch.full((4, 3), torch.inf),)])
