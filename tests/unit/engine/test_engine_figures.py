"""What is recorded of each tensor: counted in passing, and the same as counted afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modelweld.engine.run.diagnostics import combine, to_plain
from modelweld.lineage import manifest
from modelweld.methods import drm
from modelweld.reporting.layers import layer_series
from modelweld.stages.merge import merge
from tests.support.families import LLAMA_SHAPES, deltas, recipe, write_family
from tests.support.progress import Stop, Stopper

MATRIX = "model.layers.0.mlp.down_proj.weight"
KEYS = {"rank", "direction", "kept_share", "sign_conflicts", "interference"}


def of(directory: Path, tensor: str = MATRIX) -> dict[str, object]:
    entry = manifest.read(directory).data()["tensors"][tensor]
    return {key: entry[key] for key in KEYS if key in entry}


def test_a_subspace_merge_records_its_basis_and_its_election(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "drm", direction="auto", drop_rate=0.5), tmp_path / "out")
    _, stack = deltas(root, MATRIX)
    basis = drm.factorise(stack, direction="auto")
    assert of(tmp_path / "out")["direction"] == "horizontal", "16 outputs, 40 inputs"
    assert of(tmp_path / "out")["rank"] == int(basis.rank)
    assert of(tmp_path / "out")["kept_share"] == pytest.approx(0.5, abs=0.01)
    assert 0 < float(str(of(tmp_path / "out")["sign_conflicts"])) < 0.5
    assert of(tmp_path / "out", "model.norm.weight").keys() == {"kept_share", "sign_conflicts"}, "merged by ties"


def test_what_ties_keeps_and_discards_is_what_it_seems(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "ties", density=0.25), tmp_path / "out")
    _, stack = deltas(root, MATRIX)
    wanted = stack.shape[1] * stack.shape[2]
    rank = wanted - round(wanted * 0.25)
    kept = torch.stack([d * (d.abs() >= d.abs().flatten().kthvalue(rank).values) for d in stack])
    against = (kept * kept.sum(dim=0).sign() < 0).sum()
    assert of(tmp_path / "out") == {
        "kept_share": pytest.approx(float((kept != 0).double().mean()), abs=1e-6),
        "sign_conflicts": pytest.approx(float(against / (kept != 0).sum()), abs=1e-6),
    }


def test_equal_models_do_not_conflict_and_untrained_weights_keep_nothing(tmp_path: Path) -> None:
    import shutil

    root = write_family(tmp_path, experts=1)
    for number in (1, 2):
        shutil.copytree(root / "e0", root / f"e{number}")
    merge(recipe(root, "ties"), tmp_path / "same")
    assert of(tmp_path / "same")["sign_conflicts"] == 0.0
    for number in range(3):
        shutil.rmtree(root / f"e{number}")
        shutil.copytree(root / "base", root / f"e{number}")
    for name in ("ties", "drm"):
        merge(recipe(root, name), tmp_path / name)
        assert (of(tmp_path / name)["kept_share"], of(tmp_path / name)["sign_conflicts"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("knots", {}, {"rank", "kept_share", "sign_conflicts"}),
        ("knots", {"combine": "linear"}, {"rank"}),
        ("tsv_m", {}, {"rank"}),
        ("least_interference", {}, {"interference"}),
        ("least_interference", {"side": "both"}, {"interference"}),
        ("breadcrumbs", {"density": 0.6}, {"kept_share"}),
        ("breadcrumbs", {"density": 0.6, "combine": "ties"}, {"kept_share", "sign_conflicts"}),
        ("della", {"drop_rate": 0.4}, {"kept_share", "sign_conflicts"}),
    ],
)
def test_every_method_that_prunes_or_rotates_records_it(
    tmp_path: Path, name: str, options: dict[str, object], keys: set[str]
) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, name, **options), tmp_path / "out")
    found = of(tmp_path / "out")
    assert found.keys() == keys
    assert found.get("rank", 16) in (15, 16), "16 rows; a third of 16 for each of three models"
    expected = {"knots": 0.3, "breadcrumbs": 0.6, "della": 0.6}.get(name)
    assert found.get("kept_share", expected) == pytest.approx(expected, abs=0.05)


def test_methods_that_neither_prune_nor_rotate_say_nothing(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "task_arithmetic"), tmp_path / "out")
    assert of(tmp_path / "out") == {}


def test_what_was_recorded_before_an_interruption_is_recorded_after_it(tmp_path: Path) -> None:
    root = write_family(tmp_path)

    with pytest.raises(Stop):
        merge(recipe(root, "drm"), tmp_path / "out", threads=1, progress=Stopper(MATRIX))
    assert merge(recipe(root, "drm"), tmp_path / "out").resumed > 0
    assert of(tmp_path / "out").keys() == {"rank", "direction", "kept_share", "sign_conflicts"}


def test_the_card_and_the_report_sum_it_up(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "drm", drop_rate=0.8), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "4 linear tensors: drm (rank 16, 20." in card
    assert "of the entries kept" in card
    titles = [series.title for series in layer_series(manifest.read(tmp_path / "out").tensors)]
    assert [title.partition(":")[0] for title in titles] == ["delta survival", "sign conflicts", "kept share"]
    assert len(manifest.read(tmp_path / "out").data()["tensors"]) == len(LLAMA_SHAPES)


def test_the_parts_of_a_packed_weight_are_told_together() -> None:
    parts = [
        (300, {"rank": torch.tensor(8), "kept_share": torch.tensor(0.2), "direction": "vertical"}),
        (100, {"rank": torch.tensor(4), "kept_share": torch.tensor(0.6), "direction": "horizontal"}),
    ]
    assert to_plain(combine(parts)) == {"rank": 12, "kept_share": 0.3, "direction": "vertical/horizontal"}
    assert to_plain(combine([])) == {}
