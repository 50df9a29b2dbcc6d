"""The Fashion-MNIST example: its data, its merges of different initialisations, and that its files agree."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "fashion"
SCRIPTS = ("images", "train", "weld", "digits", "figures")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The example's scripts, which import each other by name because people run them by path."""
    import importlib

    sys.path.insert(0, str(EXAMPLE))
    try:
        yield {name: importlib.import_module(name) for name in SCRIPTS}
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in SCRIPTS:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return dict(yaml.safe_load((EXAMPLE / "settings.yaml").read_text(encoding="utf-8")))


def idx(path: Path, array: np.ndarray) -> Path:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    return path


class TestImages:
    def test_idx_files_are_read_and_cut_ones_refused(self, scripts: dict[str, ModuleType], tmp_path: Path) -> None:
        array = np.arange(24).reshape(2, 3, 4)
        np.testing.assert_array_equal(scripts["images"].read_idx(idx(tmp_path / "a.gz", array)), array)
        whole = gzip.decompress((tmp_path / "a.gz").read_bytes())
        (tmp_path / "b.gz").write_bytes(gzip.compress(whole[:-1]))
        (tmp_path / "c.gz").write_bytes(gzip.compress(b"PK\3\4" + whole))
        for name in ("b.gz", "c.gz"):
            with pytest.raises(scripts["images"].IdxProblem, match=name):
                scripts["images"].read_idx(tmp_path / name)

    def test_an_image_is_in_one_split_only_and_draws_are_the_same(self, scripts: dict[str, ModuleType]) -> None:
        images = scripts["images"]
        random = np.random.default_rng(0)
        pixels = random.integers(0, 256, (300, 4, 4), dtype=np.uint8)
        pixels[200:220] = pixels[:20]  # repeated within the training part
        train = images.Images(pixels, random.integers(0, 10, 300))
        test = images.Images(np.concatenate([pixels[20:60], pixels[:40] ^ 1]), random.integers(0, 10, 80))
        tasks = {"first": images.CLASSES[:5], "second": images.CLASSES[5:]}
        how = {"seed": 1, "train": 50, "validation": 20, "test": 30}
        made, again = (images.tasks_of(train, test, tasks, how) for _ in range(2))
        for task, names in tasks.items():
            assert {split: len(frame) for split, frame in made[task].items()} == {
                "test": 30, "validation": 20, "train": 50,
            }  # fmt: skip
            every = [raw for frame in made[task].values() for raw in frame["image"]]
            assert len(set(every)) == len(every)
            assert all(set(frame["label"]) <= set(names) for frame in made[task].values())
            assert all(made[task][split].equals(again[task][split]) for split in made[task])

    def test_a_machine_without_apt_is_told_so(
        self, scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(scripts["images"].PackageProblem, match="apt-get is not on this machine"):
            scripts["images"].fetch_package("dataset-fashion-mnist", "0" * 64, tmp_path / "package")


class TestMerging:
    def test_different_initialisations_collapse_when_averaged_and_not_when_zipped(
        self, scripts: dict[str, ModuleType]
    ) -> None:
        found = scripts["digits"].run(1)
        scores = found.scores
        assert scores["single models"].per_task > 0.95
        assert scores["average"].joint < scores["ensemble"].joint - 0.15
        assert scores["MuDSC zip"].per_task > 0.95
        assert scores["MuDSC zip"].joint > scores["average"].joint + 0.1
        assert scores["activation align"].per_task > 0.6
        assert set(found.chosen) == {"MuDSC align", "MuDSC zip"}
        assert found.chosen["MuDSC zip"] == max(
            found.curves["MuDSC zip"], key=lambda alpha: found.curves["MuDSC zip"][alpha]
        )

    def test_a_permuted_copy_merges_back_into_itself(self, scripts: dict[str, ModuleType]) -> None:
        from modelweld.symmetry import align
        from modelweld.symmetry.placements import Permuted

        digits, weld = scripts["digits"], scripts["weld"]
        torch.manual_seed(0)
        model, copy = digits.Perceptron(5).eval(), digits.Perceptron(5).eval()
        inputs = torch.rand(40, 64)
        pair = weld.Pair.of((model, copy), lambda: digits.Perceptron(10), inputs)
        copy.load_state_dict(pair.spec.apply(model.state_dict(), pair.spec.random(2)))
        placed = Permuted(pair.spec, list(align(pair.states, pair.spec).permutations))
        both = weld.merged(pair, placed)(inputs)
        torch.testing.assert_close(both[:, :5], model(inputs), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both[:, 5:], model(inputs), atol=1e-5, rtol=1e-5)

    def test_scores_within_own_classes_and_over_all(self, scripts: dict[str, ModuleType]) -> None:
        weld = scripts["weld"]
        rows = weld.Rows(torch.zeros(4, 1), torch.tensor([0, 1, 2, 3]))
        logits = torch.tensor([[3.0, 0, 1, 0], [0, 1, 5, 0], [0, 0, 1, 0], [9.0, 0, 1, 2]])
        found = weld.score(logits, rows, 2)
        assert found.tasks == (1.0, 1.0)
        assert found.joint == 0.5


class TestFiguresTable:
    def test_means_and_spreads_are_by_family(self, scripts: dict[str, ModuleType], tmp_path: Path) -> None:
        for pair, joint in {"resnet-1": 0.5, "resnet-2": 0.7, "vit-1": 0.4}.items():
            (tmp_path / pair).mkdir()
            record = {"systems": {"MuDSC zip": {"per_task": 0.9, "joint": joint}}, "alpha": {"MuDSC zip": 0.3}}
            (tmp_path / pair / "scores.json").write_text(json.dumps(record))
        text = scripts["figures"].table(tmp_path, ["resnet-1", "resnet-2", "vit-1"])
        assert "| MuDSC zip | 0.900 ± 0.000 | 0.600 ± 0.141 | 0.3, 0.3 |" in text
        assert "### vit, 1 pairs" in text


class TestTheFilesAgree:
    def test_pairs_are_two_tasks_of_one_architecture_and_different_seeds(self, settings: dict[str, Any]) -> None:
        for pair in settings["pairs"].values():
            first, second = (settings["experts"][pair[place]] for place in ("first", "second"))
            assert (first["task"], second["task"]) == ("first", "second")
            assert first["model"] == second["model"]
            assert first["seed"] != second["seed"]
        names = [name for task in settings["tasks"].values() for name in task]
        assert len(set(names)) == len(names) == 10

    def test_the_table_waits_for_every_pair(self, settings: dict[str, Any]) -> None:
        stages = yaml.safe_load((EXAMPLE / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        assert {f"figures/{pair}" for pair in settings["pairs"]} <= set(stages["table"]["deps"])

    @pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git, and this is no checkout")
    @pytest.mark.parametrize("made", ["package", "images", "models", "metrics", "figures", "dvc.lock", ".dvc/tmp"])
    def test_nothing_fetched_or_made_can_be_committed(self, made: str) -> None:
        path = f"examples/fashion/{made}" + ("" if made == "dvc.lock" else "/x")
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0
