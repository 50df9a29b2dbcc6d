"""The MiniLM demo's own pipeline: archives, texts, finetuning and how its files agree with params.yaml."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import yaml

from modelweld.config import load_params
from tests.conftest import FILLER, Family

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "minilm"


def load_script(name: str) -> ModuleType:
    """A script of the example as a module; it has no package because people run it by path."""
    spec = importlib.util.spec_from_file_location(f"example_minilm_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


packages = load_script("packages")
texts = load_script("texts")
prepare = load_script("prepare")


def tarball(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class TestPackages:
    def test_a_file_inside_an_archive_inside_a_wheel_is_found(self, tmp_path: Path) -> None:
        wheel = tmp_path / "package.whl"
        with zipfile.ZipFile(wheel, "w") as packed:
            packed.writestr("pkg/data.tar.gz", tarball({"set/good.txt": b"good", "set/other.txt": b"other"}))
            packed.writestr("pkg/code.py", b"raise SystemExit")
        kept = packages.keep(packages.members(wheel), ["*/data.tar.gz!*/good.txt"], tmp_path / "out")
        assert [path.name for path in kept] == ["good.txt"]
        assert (tmp_path / "out" / "good.txt").read_bytes() == b"good"
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.txt"]

    @pytest.mark.parametrize("name", ["../../evil.txt", "/etc/evil.txt", "a/../../../evil.txt"])
    def test_a_member_cannot_name_a_place_outside(self, tmp_path: Path, name: str) -> None:
        out = tmp_path / "deep" / "out"
        kept = packages.keep(packages.members(tarball({name: b"x"})), ["*evil.txt"], out)
        assert kept == [out / "evil.txt"]
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == kept

    def test_links_and_devices_are_not_unpacked(self) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            link = tarfile.TarInfo("pkg/link.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        assert packages.members(buffer.getvalue()) == {}

    def test_another_layout_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(packages.PackageProblem, match="20newsgroups"):
            packages.keep({"pkg/else.tab": b""}, ["*/20newsgroups-*.tab"], tmp_path)

    def test_every_package_is_pinned_to_a_version_and_a_digest(self) -> None:
        settings = yaml.safe_load((EXAMPLE / "settings.yaml").read_text(encoding="utf-8"))
        for entry in settings["packages"].values():
            assert "==" in entry["requirement"]
            assert len(bytes.fromhex(entry["sha256"])) == 32


BOUNDS = texts.Bounds(seed=3, train=40, validation=10, test=10)


def rows(count: int, prefix: str = "text") -> pd.DataFrame:
    return pd.DataFrame({"text": [f"{prefix} {n}" for n in range(count)], "label": [str(n % 2) for n in range(count)]})


class TestTexts:
    def test_sizes_are_bounded_and_splits_disjoint(self) -> None:
        parts = texts.split(texts.Texts(rows(100)), BOUNDS)
        assert {name: len(part) for name, part in parts.items()} == {"train": 40, "validation": 10, "test": 10}
        together = pd.concat(parts.values())["text"]
        assert together.is_unique

    def test_the_order_of_the_source_does_not_matter(self) -> None:
        source = rows(100)
        shuffled = source.sample(frac=1.0, random_state=1)
        first, second = (texts.split(texts.Texts(frame), BOUNDS) for frame in (source, shuffled))
        for name in texts.SPLITS:
            pd.testing.assert_frame_equal(first[name], second[name])

    def test_another_seed_draws_other_rows(self) -> None:
        other = texts.Bounds(seed=4, train=40, validation=10, test=10)
        first, second = (texts.split(texts.Texts(rows(100)), bounds) for bounds in (BOUNDS, other))
        assert set(first["test"]["text"]) != set(second["test"]["text"])

    def test_the_same_text_spelled_otherwise_stays_in_one_split(self) -> None:
        source = rows(80)
        shouted = source.assign(text=source["text"].str.upper() + "!!")
        parts = texts.split(texts.Texts(pd.concat([source, shouted])), BOUNDS)
        keys = pd.concat(parts.values())["text"].str.lower().str.rstrip("!")
        assert keys.is_unique

    def test_an_official_test_text_never_reaches_training(self) -> None:
        train, test = rows(100), pd.concat([rows(30), rows(20, "fresh")])
        parts = texts.split(texts.Texts(train, test), BOUNDS)
        assert not set(test["text"]) & {*parts["train"]["text"], *parts["validation"]["text"]}
        assert set(parts["test"]["text"]) <= set(test["text"])

    def test_contradictory_and_empty_rows_are_dropped(self) -> None:
        bad = pd.DataFrame({"text": ["same", "Same.", "  ", "..."], "label": ["0", "1", "0", "1"]})
        everything = texts.Bounds(seed=3, train=200, validation=10, test=10)
        parts = texts.split(texts.Texts(pd.concat([rows(100), bad])), everything)
        together = pd.concat(parts.values())["text"]
        assert len(together) == 100
        assert not set(together) & set(bad["text"])

    def test_links_and_entities_leave_tweets(self, tmp_path: Path) -> None:
        folder = tmp_path / "orange"
        folder.mkdir()
        (folder / "election-tweets-2016.tab").write_text(
            "Is retweet\tAuthor\tContent\ndiscrete\tdiscrete\tstring\n\tclass\tmeta\n"
            'False\tA\tyou &amp; me https://t.co/x1\nTrue\tA\tsomebody else\'s\nFalse\tB\t"two\nlines"\n',
            encoding="utf-8",
        )
        found = texts.election(tmp_path).rows
        assert found["label"].tolist() == ["A", "B"]
        assert [text.strip() for text in found["text"]] == ["you & me", "two\nlines"]

    def test_a_task_that_is_too_small_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(texts, "TASKS", {"tiny": lambda _: texts.Texts(rows(50))})
        with pytest.raises(texts.TextProblem, match=r"tiny/.*rows"):
            texts.write(tmp_path, tmp_path / "out", BOUNDS)


class TestTheFilesAgree:
    def test_every_task_has_an_expert_and_is_evaluated(self) -> None:
        settings = yaml.safe_load((EXAMPLE / "settings.yaml").read_text(encoding="utf-8"))
        params = load_params(ROOT / "params.yaml")
        assert set(settings["experts"]) == set(texts.TASKS) == set(params.tasks)
        assert {task.max_length for task in params.tasks.values()} == {settings["training"]["max_length"]}

    def test_sources_are_what_the_example_makes(self) -> None:
        params = load_params(ROOT / "params.yaml")
        assert {name: source.uri for name, source in params.models.items()} == {
            name: f"examples/minilm/models/{name}" for name in ["base", *texts.TASKS]
        }
        assert {name: source.uri for name, source in params.datasets.items()} == {
            name: f"examples/minilm/texts/{name}" for name in texts.TASKS
        }
        assert all(source.licence for source in [*params.models.values(), *params.datasets.values()])

    @pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git, and this is no checkout")
    @pytest.mark.parametrize("made", ["packages", "texts", "models", "metrics", "dvc.lock", ".dvc/tmp"])
    def test_nothing_fetched_or_made_can_be_committed(self, made: str) -> None:
        path = f"examples/minilm/{made}" + ("" if made == "dvc.lock" else "/x")
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0


@pytest.fixture(scope="module")
def finetune() -> ModuleType:
    return load_script("finetune")


def order_task(root: Path, base: Path) -> Path:
    """`root` laid out like the example; the label is which of two words comes first, which averages cannot tell."""
    shutil.copytree(base, root / "models" / "base")
    folder = root / "texts" / "order"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in {"train": 600, "validation": 100, "test": 100}.items():
        found = []
        for _ in range(count):
            words = list(random.choice(FILLER, size=6))
            first, second = sorted(random.choice(6, size=2, replace=False))
            leads = bool(random.integers(2))
            words[first], words[second] = ("crimson", "azure") if leads else ("azure", "crimson")
            found.append({"text": " ".join(words), "label": "red" if leads else "blue"})
        pd.DataFrame(found).to_parquet(folder / f"{split}.parquet", index=False)
    return root


class TestFinetune:
    @pytest.mark.parametrize("labels", [2, 4])
    def test_the_head_predicts_what_the_probe_predicts(self, finetune: ModuleType, labels: int) -> None:
        import torch

        generator = np.random.default_rng(0)
        centres = generator.normal(size=(labels, 8)) * 2 + 5
        truth = generator.integers(0, labels, size=200)
        seen = (centres[truth] + generator.normal(size=(200, 8))).astype(np.float32)
        probe = finetune.best_probe(seen, truth, seen, truth, [0.1])
        head = torch.nn.Linear(8, labels)
        finetune.set_head(head, probe)
        logits = head(torch.from_numpy(seen)).detach()
        np.testing.assert_allclose(logits.softmax(-1).numpy(), probe.predict_proba(seen), atol=1e-4)

    def test_an_epoch_takes_every_row_once_and_is_the_same_again(self, finetune: ModuleType) -> None:
        ids = [[0] * (n % 17 + 1) for n in range(100)]
        chosen = finetune.schedule(ids, 8, 13, seed=5)
        assert chosen == finetune.schedule(ids, 8, 13, seed=5)
        assert chosen != finetune.schedule(ids, 8, 13, seed=6)
        assert sorted(row for batch in chosen for row in batch) == list(range(100))

    def test_an_expert_no_better_than_the_probe_is_refused(self, finetune: ModuleType) -> None:
        same = {"expert": {"accuracy": 0.8}, "probe": {"accuracy": 0.8}}
        with pytest.raises(finetune.WeakExpert, match=r"movies: .*0\.800.*\n.*experts\.movies\.steps"):
            finetune._refuse_weak("movies", same)

    def test_an_expert_is_made_reproducibly_and_fits_its_base(
        self, finetune: ModuleType, tiny_bert_family: Family, tmp_path: Path
    ) -> None:
        from safetensors.numpy import load_file
        from transformers import AutoModelForSequenceClassification

        how = finetune.Training(
            seed=1, threads=1, precision="float32", max_length=16, batch_size=32, learning_rate=3e-3,
            weight_decay=0.0, warmup=0.1, probe_strengths=[0.1],
        )  # fmt: skip
        root = order_task(tmp_path / "project", tiny_bert_family.base)
        result = finetune.make_expert("order", root, 150, how)
        folder = root / "models" / "order"
        first = load_file(folder / "model.safetensors")
        assert result["validation"]["expert"]["accuracy"] > 0.9 > result["validation"]["probe"]["accuracy"]
        assert (root / "metrics" / "order.json").is_file()

        base = load_file(root / "models" / "base" / "model.safetensors")
        backbone = {name.removeprefix("bert."): value for name, value in first.items() if name.startswith("bert.")}
        assert backbone.keys() == base.keys()
        words = "embeddings.word_embeddings.weight"
        np.testing.assert_array_equal(backbone[words], base[words])
        assert not np.array_equal(backbone["pooler.dense.weight"], base["pooler.dense.weight"])
        assert (folder / "tokenizer.json").read_bytes() == (root / "models" / "base" / "tokenizer.json").read_bytes()
        config = AutoModelForSequenceClassification.from_pretrained(folder).config
        assert config.id2label == {0: "blue", 1: "red"}
        assert config.hidden_dropout_prob == 0.1

        finetune.make_expert("order", root, 150, how)
        again = load_file(folder / "model.safetensors")
        assert all(np.array_equal(first[name], again[name]) for name in first)

        with pytest.raises(finetune.WeakExpert):
            finetune.make_expert("order", root, 1, how)
        np.testing.assert_array_equal(load_file(folder / "model.safetensors")[f"bert.{words}"], base[words])


class TestPrepare:
    def test_the_table_names_probe_and_expert(self, tmp_path: Path) -> None:
        score = {"expert": {"accuracy": 0.9}, "probe": {"accuracy": 0.8}}
        result = {"task": "movies", "labels": 2, "test": score, "seconds": {"probe": 1.0, "finetune": 2.4}}
        (tmp_path / "movies.json").write_text(json.dumps(result), encoding="utf-8")
        assert prepare.table(tmp_path).splitlines()[1].split() == ["movies", "2", "0.800", "0.900", "3"]

    def test_children_find_this_interpreter_and_send_nothing(self) -> None:
        environment = prepare.environment()
        assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
        assert environment["DVC_NO_ANALYTICS"] == environment["HF_HUB_OFFLINE"] == "1"
