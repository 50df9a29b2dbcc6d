"""MuDSC against recordings of the paper's own code: whole merges, single matchings, correlations.

The whole set is read from the folder that MODELWELD_GOLDEN names; tests/golden/mudsc holds a subset for everyone else.
The recordings' own groups are used (their ViT matches the heads of queries and values apart), and the paper's
similarity, which is mode `reference` here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modelweld.symmetry import align, zip_models
from modelweld.symmetry.matching import match, match_nested
from modelweld.symmetry.placements import Clustered, Permuted
from modelweld.symmetry.similarity import Activations, correlate
from modelweld.symmetry.spec import Factor, Group, Spec
from modelweld.symmetry.zipping import zip_units

SUBSET = Path(__file__).parent / "mudsc"
FULL_CASES, FULL_MATCHINGS = 56, 20
WEIGHTS, TRACE = 2e-5, 1e-5
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module", params=["subset", pytest.param("full", marks=pytest.mark.slow)])
def oracle(request: pytest.FixtureRequest) -> Path:
    if request.param == "subset":
        return SUBSET
    named: Path = request.getfixturevalue("golden")
    return named / "mudsc" if (named / "mudsc").is_dir() else named


@dataclass(frozen=True)
class Case:
    """One recorded merge: its models, its groups, what went in and what came out."""

    record: dict[str, Any]
    states: list[dict[str, Tensor]]
    spec: Spec
    first_site: dict[str, tuple[Factor, ...]]
    activations: dict[str, Tensor] | None
    expected: dict[str, Tensor]

    @property
    def alpha(self) -> float:
        return {"weight": 1.0, "act": 0.0, "dual": self.record["alpha"]}[self.record["space"]]

    def merged(self, placed: Permuted | Clustered) -> float:
        """The largest error of a merged tensor, relative to its largest entry."""
        worst = 0.0
        recorded = {name[7:]: tensor for name, tensor in self.expected.items() if name.startswith("merged.")}
        for name, tensor in apart(recorded).items():
            if not name.endswith(STATISTICS):
                own = [placed.tensor(name, state[name].double(), model) for model, state in enumerate(self.states)]
                difference = torch.stack(own).mean(dim=0) - tensor
                worst = max(worst, float(difference.abs().max() / tensor.abs().max()))
        return worst


def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Packed projections as three: the recordings give each a group of its own."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        pieces = tensor.chunk(3) if "qkv" in name else [tensor]
        for letter, piece in zip("qkv", pieces, strict=False):
            out[f"{name}_{letter}" if len(pieces) == 3 else name] = piece
    return out


def recorded_spec(groups: dict[str, list[list[Any]]], state: dict[str, Tensor]) -> Spec:
    known: dict[str, Group] = {}
    lies: dict[tuple[str, int], tuple[Factor, ...]] = {}
    reads = set()
    for name, sites in groups.items():
        size = state[sites[0][1]].shape[sites[0][0]]
        number = next((site[2]["group"]["num"] for site in sites if len(site) > 2 and "group" in site[2]), None)
        known[name] = Group(name, number or size)
        factors = (Factor(number or size, name),)
        if number:
            known[f"{name}/inside"] = Group(f"{name}/inside", size // number, (name,))
            factors = (*factors, Factor(size // number, f"{name}/inside"))
        for dim, tensor, *rest in sites:
            lies[tensor, dim] = factors
            if rest and "in" in rest[0]:
                reads.add((tensor, dim))
    axes = {
        name: tuple(
            lies.get((name, dim), (Factor(size, None, "not grouped"),)) for dim, size in enumerate(tensor.shape)
        )
        for name, tensor in state.items()
    }
    return Spec(known, axes, frozenset(reads))


def cases(oracle: Path, mode: str) -> list[Case]:
    manifest = json.loads((oracle / "manifest.json").read_text())
    found = []
    for record in manifest["cases"]:
        if record["mode"] != mode:
            continue
        models = manifest["models"][record["arch"]]["files"][: record["n"]]
        states = [
            {name: tensor for name, tensor in apart(load_file(oracle / file)).items() if tensor.is_floating_point()}
            for file in models
        ]
        groups = manifest["specs"][record["arch"]]
        spec = recorded_spec(groups, states[0])
        activations = None
        if record["space"] != "weight":
            # The recordings keep them in one file for all cases of an architecture.
            source = load_file(oracle / f"{record['arch']}-{record['n']}m-align-dual-a0.5.safetensors")
            named = {name.split(".")[1]: tensor for name, tensor in source.items() if name.startswith("act_sims")}
            inside = {name: f"{name}/inside" if f"{name}/inside" in spec.groups else name for name in named}
            activations = {inside[name]: tensor for name, tensor in named.items()}
        first = {
            group: next(axis for axes in spec.axes.values() for axis in axes if axis[0].group == group)
            for group in groups
        }
        found.append(Case(record, states, spec, first, activations, load_file(oracle / record["file"])))
    return found


def same_trace(recorded: list[float], found: tuple[float, ...]) -> bool:
    return len(recorded) == len(found) and bool(np.allclose(recorded, found, rtol=0, atol=TRACE))


def test_every_alignment(oracle: Path) -> None:
    wrong = []
    for case in (found := cases(oracle, "align")):
        alignment = align(case.states, case.spec, case.activations, case.alpha, mode="reference")
        if case.record["fp64_same_matching"]:
            for group, factors in case.first_site.items():
                unmerge = case.expected[f"perm.{group}.unmerge"].int()
                units = unmerge.shape[1]
                for model in range(1, case.record["n"]):
                    expected = unmerge[model * units : (model + 1) * units].argmax(0)
                    if not expected.equal(case.spec.index(factors, alignment.permutations[model])):
                        wrong.append((case.record["name"], "matching", group))
        if not same_trace(case.record["trace"], alignment.trace):
            wrong.append((case.record["name"], "trace", ""))
        if not case.merged(Permuted(case.spec, list(alignment.permutations))) <= WEIGHTS:
            wrong.append((case.record["name"], "weights", ""))
    assert not wrong, wrong
    assert len(found) == FULL_CASES / 2 or oracle == SUBSET


def test_every_zip(oracle: Path) -> None:
    wrong = []
    for case in (found := cases(oracle, "zip")):
        zipped = zip_models(case.states, case.spec, case.activations, case.alpha, mode="reference")
        if case.record["fp64_same_matching"]:
            for group, factors in case.first_site.items():
                unmerge = case.expected[f"perm.{group}.unmerge"].int()
                units = unmerge.shape[1]
                for model in range(case.record["n"]):
                    expected = unmerge[model * units : (model + 1) * units].argmax(1)
                    if not expected.equal(zipped.placed.destination(factors, model)):
                        wrong.append((case.record["name"], "matching", group))
        if not same_trace(case.record["trace"], zipped.trace):
            wrong.append((case.record["name"], "trace", ""))
        if not case.merged(zipped.placed) <= WEIGHTS:
            wrong.append((case.record["name"], "weights", ""))
    assert not wrong, wrong
    assert len(found) == FULL_CASES / 2 or oracle == SUBSET


def test_every_single_matching(oracle: Path) -> None:
    manifest = json.loads((oracle / "manifest.json").read_text())
    tensors = load_file(oracle / "unit.safetensors")
    for case in manifest["unit"]:
        key, models, units, elements = case["key"], case["n"], case["O"], case["groups"]
        similarity = tensors[f"{key.split('.')[0]}.sims"].numpy()
        unmerge = tensors[f"{key}.unmerge"].numpy().argmax(axis=1).reshape(models, elements, -1)
        if case["mode"] == "zip" and elements == 1:
            zipped = zip_units(similarity, models, beta=case["a"], budget=case["b"])
            assert (zipped.cluster == unmerge.reshape(-1)).all(), key
            assert zipped.value == pytest.approx(case["value"], abs=1e-6)
        elif case["mode"] == "align":
            total = 0.0
            for model in range(1, models):
                block = similarity[:units, model * units : (model + 1) * units].astype(np.float64)
                if elements == 1:
                    columns, value = match(block, stay=False)
                else:
                    size = units // elements
                    parts = {"inside": block.reshape(elements, size, elements, size)}
                    nested = match_nested(parts, stay=False)
                    # Scores are sums over what lies inside; the recordings give means over units.
                    columns, value = (nested.outer[:, None] * size + nested.inner["inside"]).reshape(-1), nested.value
                assert (unmerge[model].reshape(-1)[columns] == np.arange(units)).all(), key
                total += value
            assert total / (models - 1) == pytest.approx(case["value"], abs=1e-6)
        else:
            # Outer elements are taken as recorded; what lies inside each is zipped over all models. The recordings
            # do not use the budget here.
            size, values = units // elements, []
            for place in range(elements):
                owners = [np.flatnonzero(unmerge[model, :, 0] // size == place)[0] for model in range(models)]
                members = [m * units + owner * size + np.arange(size) for m, owner in enumerate(owners)]
                index = np.concatenate(members)
                zipped = zip_units(similarity[np.ix_(index, index)], models, beta=case["a"])
                assert (zipped.cluster == unmerge.reshape(-1)[index] - place * size).all(), key
                values.append(zipped.value)
            assert np.mean(values) == pytest.approx(case["value"], abs=1e-6)
    assert len(manifest["unit"]) == FULL_MATCHINGS or oracle == SUBSET


def test_recorded_correlations(oracle: Path) -> None:
    tensors = load_file(oracle / "unit.safetensors")
    features, expected = tensors["n2_O24_G1.feats"].double(), tensors["n2_O24_G1.sims"].double()
    streamed = Activations()
    for part in features.split(37, dim=1):
        streamed.add(part)
    for found in (correlate(features), streamed.correlation()):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
