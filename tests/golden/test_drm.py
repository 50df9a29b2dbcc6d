"""DRM against recordings of the paper's own code, run in float64.

The whole set is read from the folder that MODELWELD_GOLDEN names; tests/golden/drm holds a subset for everyone else.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modelweld.methods import drm, ties
from modelweld.methods.numerics.election import elect
from modelweld.methods.numerics.selection import magnitude_threshold

SUBSET = Path(__file__).parent / "drm"
FULL_COUNTS = {"well_posed": 654, "tie_sensitive": 28, "nan": 21, "noise_defined": 21, "error": 14}
TOLERANCE = {"well_posed": 1e-9, "tie_sensitive": 2e-2}


@pytest.fixture(scope="module", params=["subset", pytest.param("full", marks=pytest.mark.slow)])
def oracle(request: pytest.FixtureRequest) -> Path:
    if request.param == "subset":
        return SUBSET
    named: Path = request.getfixturevalue("golden")
    return named / "drm" if (named / "drm").is_dir() else named


def merged(deltas: Tensor, case: dict[str, Any]) -> Tensor:
    weights = case["coeffs"]
    return drm.merge(
        deltas,
        direction={"h": "horizontal", "v": "vertical"}[case["side"]],
        drop_rate=case["drop"],
        weights=[weights] * case["N"] if isinstance(weights, float) else weights,
        disjoint_mean=case["disjoint"],
    )


def test_every_matrix_case(oracle: Path) -> None:
    manifest = json.loads((oracle / "manifest.json").read_text())
    tensors = load_file(oracle / "matrix.safetensors")
    wrong = []
    for case in manifest["cases"]:
        name = case["case"].split(".")[0]
        deltas = torch.stack([tensors[f"{name}.delta{index}"] for index in range(case["N"])])
        before = deltas.clone()
        result = merged(deltas, case)
        assert torch.equal(deltas, before), "the caller's stack was changed"
        assert result.dtype == torch.float64
        assert result.isfinite().all(), case["case"]
        if case["class"] in TOLERANCE:
            expected = tensors[f"{case['case']}.out_f64"]
            error = float((result - expected).norm() / expected.norm())
            if not error <= TOLERANCE[case["class"]]:
                wrong.append((case["case"], error))
        elif case["kind"] in ("allzero", "anti"):  # nobody trained it; A and -A cancel in every entry
            assert not result.any(), case["case"]
        else:
            assert case["kind"] == "zero1"
            trained = deltas.flatten(1).any(dim=1)
            weights = case["coeffs"]
            if isinstance(weights, list):
                weights = [w for w, on in zip(weights, trained.tolist(), strict=True) if on]
            alone = merged(deltas[trained], {**case, "N": int(trained.sum()), "coeffs": weights})
            torch.testing.assert_close(result, alone, rtol=0, atol=1e-12 * float(alone.abs().max()))
    assert not wrong, wrong
    counts = Counter(case["class"] for case in manifest["cases"])
    assert set(counts) == set(FULL_COUNTS)
    if oracle != SUBSET:
        assert counts == FULL_COUNTS


# Recorded in float32 by the reference. Left out: options that are not part of the method (no sign election on the
# other parameters; choosing the direction by rank or orthogonality) and drop rate 0, where the reference silently
# falls back to a plain mean.
MODULES = ["h08", "v08", "h05c", "h09nl", "v08qkv", "h08nodj", "h08ign"]


def test_every_module_case(oracle: Path) -> None:
    manifest = json.loads((oracle / "manifest.json").read_text())
    tensors = load_file(oracle / "modules.safetensors")
    base = {name[5:]: value for name, value in tensors.items() if name.startswith("base.")}
    parameters = [name for name in base if name != "buf"]
    deltas = {name: torch.stack([tensors[f"ft{i}.{name}"] - base[name] for i in range(3)]) for name in parameters}
    cases = [case for case in manifest["modules"] if case["case"] in MODULES]
    assert len(cases) >= 6
    for case in cases:
        options = case["kw"]
        disjoint = options.get("enable_disjoint_mean", True)
        weights = options.get("merging_coeffs")
        others = [name for name in parameters if name not in case["linear"]]
        keep = 1 - options.get("non_linear_weight_magnitude_dropping_rate", 0.0)
        together = torch.cat([deltas[name].flatten(1) for name in others], dim=1)  # (3, all other parameters)
        thresholds = ties.trim_thresholds(together, keep)
        for name in parameters:
            if any(name.startswith(pattern.rstrip("*")) for pattern in options.get("ignore_patterns", [])):
                continue
            if name in case["linear"]:
                packed = options.get("native_stacked_QKV") and name.startswith("in_proj")
                result = torch.cat(
                    [
                        drm.merge(
                            part,
                            direction="horizontal" if options.get("is_horizontal_stack", True) else "vertical",
                            drop_rate=options["singular_matrices_drop_rate"],
                            weights=weights,
                            disjoint_mean=disjoint,
                        )
                        for part in deltas[name].chunk(3 if packed else 1, dim=1)
                    ]
                )
            else:
                result = ties.merge(deltas[name], thresholds=thresholds, weights=weights, disjoint_mean=disjoint)
            expected = tensors[f"out.{case['case']}.{name}"].double() - base[name].double()
            error = float((result.double() - expected).norm() / expected.norm())
            assert error <= 1e-4, (case["case"], name, error)


@pytest.mark.parametrize(("case", "ratio"), [(0, 0.5), (1, 0.2), (2, 0.5), (3, 0.25), (4, 0.1), (5, 1.0), (6, 0.05)])
def test_trimming_keeps_what_the_reference_keeps(case: int, ratio: float) -> None:
    tensors = load_file(SUBSET / "primitives.safetensors")
    values = tensors[f"topk{case}.x"]
    kept = values * (values.abs() >= magnitude_threshold(values, ratio))
    assert torch.equal(kept, tensors[f"topk{case}.y"])


def test_sign_election_breaks_ties_as_the_reference_does() -> None:
    tensors = load_file(SUBSET / "primitives.safetensors")
    assert torch.equal(elect(tensors["sign.x"], torch.ones(3)), tensors["sign.mean"])


def test_the_subset_names_its_origin() -> None:
    origin = json.loads((SUBSET / "manifest.json").read_text())["origin"]
    assert "yophis/decom-renorm-merge at commit 8c0f961" in origin
    assert sum(file.stat().st_size for file in SUBSET.iterdir()) <= 1_000_000
