"""The MiniLM demo's own pipeline: archives, texts, finetuning and how its files agree with params.yaml."""

from __future__ import annotations

import importlib
import io
import queue
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from modelweld.config import load_params
from tests.conftest import FILLER, Family

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "minilm"


def load_script(name: str) -> ModuleType:
    """A script of the example; they import each other by name because people run them by path."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLE))


packages = load_script("packages")
prepare = load_script("prepare")
problems = load_script("problems")
progress = load_script("progress")
recipe = load_script("recipe")
texts = load_script("texts")
uptodate = load_script("uptodate")
QUIET = Console(file=io.StringIO())


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
        with pytest.raises(problems.PackageProblem, match="20newsgroups"):
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
        with pytest.raises(problems.TextProblem, match=r"tiny/.*rows"):
            texts.write(tmp_path, tmp_path / "out", BOUNDS, QUIET)


PLACES = {"demo": (ROOT / "params.yaml", "examples/minilm"), "showcase": (EXAMPLE / "showcase/params.yaml", "inputs")}


@pytest.mark.parametrize("name", ["demo", "showcase"])
class TestTheFilesAgree:
    def test_every_task_has_an_expert_and_is_evaluated(self, name: str) -> None:
        made, params = recipe.Recipe.read(name), load_params(PLACES[name][0])
        assert set(made.experts) == set(texts.TASKS) == set(params.tasks)
        assert {task.max_length for task in params.tasks.values()} == {made.training.max_length}
        assert made.split["test"] >= params.validate_.min_rows

    def test_sources_are_what_the_example_makes(self, name: str) -> None:
        file, folder = PLACES[name]
        params = load_params(file)
        assert file.parent / folder == recipe.Recipe.read(name).out
        assert {key: source.uri for key, source in params.models.items()} == {
            key: f"{folder}/models/{key}" for key in ["base", *texts.TASKS]
        }
        assert {key: source.uri for key, source in params.datasets.items()} == {
            key: f"{folder}/texts/{key}" for key in texts.TASKS
        }
        assert all(source.licence for source in [*params.models.values(), *params.datasets.values()])


class TestTheShowcase:
    def test_it_is_a_project_of_its_own_with_this_repositorys_graph(self) -> None:
        assert (EXAMPLE / "showcase" / "dvc.yaml").read_text() == (ROOT / "dvc.yaml").read_text()
        assert (EXAMPLE / "showcase" / ".dvc" / "config").read_text() == (ROOT / ".dvc" / "config").read_text()
        demo, showcase = (load_params(file).name for file, _ in PLACES.values())
        assert demo != showcase

    def test_it_trains_more_than_the_demo(self) -> None:
        demo, showcase = recipe.Recipe.read("demo"), recipe.Recipe.read("showcase")
        assert all(showcase.work(task) > 10 * demo.work(task) for task in demo.experts)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git, and this is no checkout")
@pytest.mark.parametrize(
    "made", ["packages/x", "texts/x", "models/x", "made.json", "showcase/inputs/x", "showcase/merged/x"]
)
def test_nothing_fetched_or_made_can_be_committed(made: str) -> None:
    path = f"examples/minilm/{made}"
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0


class TestUpToDate:
    def test_a_product_is_made_again_when_anything_before_it_changed_or_it_is_gone(self, tmp_path: Path) -> None:
        code = tmp_path / "code.py"
        code.write_text("1")
        key = uptodate.key_of(code, {"a": 1}, "before")
        made = uptodate.Made(tmp_path)
        assert not made.has("out", key)
        (tmp_path / "out").mkdir()
        made.note("out", key, {"accuracy": 0.5})
        made.note("other", "another key")
        assert made.has("out", key)
        assert made.facts("out") == {"accuracy": 0.5}
        assert not made.has("out", uptodate.key_of(code, {"a": 2}, "before"))
        assert not made.has("out", uptodate.key_of(code, {"a": 1}, "after"))
        code.write_text("2")
        assert not made.has("out", uptodate.key_of(code, {"a": 1}, "before"))
        (tmp_path / "out").rmdir()
        assert not made.has("out", key)

    def test_only_what_depends_on_a_change_is_made_again(self, tmp_path: Path) -> None:
        given = replace(recipe.Recipe.read("demo"), out=tmp_path)
        keys = prepare.Keys.of(given)
        steps = {task: replace(own, steps=own.steps + (task == "movies")) for task, own in given.experts.items()}
        longer = prepare.Keys.of(replace(given, experts=steps))
        assert [task for task in keys.experts if keys.experts[task] != longer.experts[task]] == ["movies"]
        assert (keys.texts, keys.base) == (longer.texts, longer.base)
        redrawn = prepare.Keys.of(replace(given, split=given.split | {"seed": 1}))
        assert redrawn.base == keys.base
        assert all(redrawn.experts[task] != keys.experts[task] for task in keys.experts)


class TestEstimate:
    def test_processes_take_the_next_expert_when_they_are_free(self) -> None:
        assert recipe.seconds_of([9.0, 5.0, 5.0, 5.0], 2) == 14.0
        assert recipe.seconds_of([3.0, 3.0], 1) == 6.0
        assert recipe.seconds_of([3.0], 4) == 3.0

    def test_frozen_layers_are_computed_once_per_row_and_not_per_step(self) -> None:
        given = recipe.Recipe.read("demo")
        thawed = replace(given, training=replace(given.training, frozen_layers=0))
        how, steps = given.training, given.experts["movies"].steps
        saved = recipe.FILLED * 3 * how.frozen_layers * how.max_length
        more = (
            saved * steps * how.batch_size
            + recipe.FILLED * how.max_length * how.frozen_layers * given.split["validation"]
        )
        assert thawed.work("movies") - given.work("movies") == pytest.approx(more)

    def test_lines_say_how_much_time_is_left_where_no_bar_can_be_drawn(self) -> None:
        console, reports = Console(file=io.StringIO(), width=200), queue.Queue()
        with progress.Experts(console, reports, {"a": 10.0, "b": 30.0}) as bars:
            bars.read()
            assert console.file.getvalue() == ""
            reports.put(("b", 20.0))
            bars.read()
            assert console.file.getvalue().startswith("  50% of all experts, about ")
            bars.finished("b", "b is done")
            reports.put(("a", 10.0))
            bars.read()
        assert console.file.getvalue().splitlines()[1:] == ["  b is done", "  100% of all experts, about 0 s left"]


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("finetune")


TINY = recipe.Training(
    seed=1,
    max_length=16,
    batch_size=32,
    frozen_layers=0,
    weight_decay=0.0,
    warmup=0.1,
    probe_strengths=[0.1],
    head=recipe.Head(standardised=True, strengths=[0.1]),
)


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
    @pytest.mark.parametrize("standardised", [True, False])
    @pytest.mark.parametrize("labels", [2, 4])
    def test_the_head_predicts_what_the_probe_predicts(
        self, finetune: ModuleType, labels: int, standardised: bool
    ) -> None:
        import torch

        generator = np.random.default_rng(0)
        centres = generator.normal(size=(labels, 8)) * 2 + 5
        truth = generator.integers(0, labels, size=200)
        seen = (centres[truth] + generator.normal(size=(200, 8))).astype(np.float32)
        probe = finetune.best_probe((seen, truth), (seen, truth), [0.1], standardised=standardised)
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
        with pytest.raises(problems.WeakExpert, match=r"movies: .*0\.800.*\n.*experts\.movies\.steps"):
            finetune._refuse_weak("movies", {"expert": 0.8, "probe": 0.8})

    def test_an_expert_is_made_reproducibly_and_fits_its_base(
        self, finetune: ModuleType, tiny_bert_family: Family, tmp_path: Path
    ) -> None:
        from safetensors.numpy import load_file
        from transformers import AutoModelForSequenceClassification

        root = order_task(tmp_path / "project", tiny_bert_family.base)
        result = finetune.make_expert("order", root, recipe.Expert(150, 3e-3), TINY)
        folder = root / "models" / "order"
        first = load_file(folder / "model.safetensors")
        assert result["accuracy"]["expert"] > 0.9 > result["accuracy"]["probe"]

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

        finetune.make_expert("order", root, recipe.Expert(150, 3e-3), TINY)
        again = load_file(folder / "model.safetensors")
        assert all(np.array_equal(first[name], again[name]) for name in first)

        with pytest.raises(problems.WeakExpert):
            finetune.make_expert("order", root, recipe.Expert(1, 3e-3), TINY)
        np.testing.assert_array_equal(load_file(folder / "model.safetensors")[f"bert.{words}"], base[words])

    def test_frozen_layers_keep_every_byte_and_change_no_output(
        self, finetune: ModuleType, tiny_bert_family: Family, tmp_path: Path
    ) -> None:
        import torch
        from safetensors.numpy import load_file
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        root = order_task(tmp_path / "project", tiny_bert_family.base)
        how = replace(TINY, frozen_layers=1)
        result = finetune.make_expert("order", root, recipe.Expert(150, 3e-3), how)
        expert = load_file(root / "models" / "order" / "model.safetensors")
        base = load_file(root / "models" / "base" / "model.safetensors")
        changed = {name for name in base if not np.array_equal(base[name], expert[f"bert.{name}"])}
        assert changed
        assert all(name.startswith(("encoder.layer.1.", "pooler.")) for name in changed)

        # What was computed from kept activations is what the saved model computes from texts.
        tokenizer = AutoTokenizer.from_pretrained(root / "models" / "order")
        model = AutoModelForSequenceClassification.from_pretrained(root / "models" / "order").eval()
        _, splits = finetune.read_splits(root / "texts" / "order", tokenizer, how.max_length)
        held, told = splits["validation"], []
        rows = list(range(40))
        whole = model(**tokenizer.pad({"input_ids": [held.ids[row] for row in rows]}, return_tensors="pt")).logits
        finetune.freeze(model.bert, {"validation": held}, 1, told.append)
        with torch.no_grad():
            torch.testing.assert_close(finetune.logits(model, held, rows, 1), whole, atol=1e-5, rtol=1e-5)
        assert result["accuracy"]["expert"] == pytest.approx(finetune.accuracy(model, held, 1, told.append))
        assert min(told) > 0

    def test_timed_steps_are_divided_by_the_work_that_settings_say(
        self, finetune: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        how = replace(recipe.Recipe.read("demo").training, batch_size=2, max_length=4)
        clock = iter([0.0, 100.0, 200.0, 206.0])  # the first step is not counted
        monkeypatch.setattr(finetune, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        assert finetune.seconds_per_work(how) == pytest.approx(6.0 / finetune.TIMED_STEPS / how.step_work)


class TestPrepare:
    def test_experts_are_made_side_by_side_once_and_again_only_where_they_changed(
        self, tiny_bert_family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(str(EXAMPLE))
        root = order_task(tmp_path / "project", tiny_bert_family.base)
        shutil.copytree(root / "texts" / "order", root / "texts" / "again")
        split = {"seed": 1, "train": 600, "validation": 100, "test": 100}
        experts = {task: recipe.Expert(150, 3e-3) for task in ("order", "again")}
        given = recipe.Recipe(root, split, TINY, experts)
        keys, made = prepare.Keys.of(given), uptodate.Made(root)
        made.note("texts", keys.texts)
        made.note("models/base", keys.base)

        console = Console(file=io.StringIO(), width=300)
        assert prepare.prepare(given, console).experts == ["order", "again"]
        said = console.file.getvalue()
        assert "finetune 2 experts" in said
        assert "one step takes " in said
        assert said.index("one step takes ") < said.index("order: accuracy ")
        assert made.facts("models/order")["accuracy"]["expert"] > 0.9
        files = [root / "models" / task / "model.safetensors" for task in experts]
        assert files[0].read_bytes() == files[1].read_bytes()

        assert not prepare.prepare(given, QUIET).anything
        longer = replace(given, experts=experts | {"again": recipe.Expert(151, 3e-3)})
        assert prepare.prepare(longer, QUIET).experts == ["again"]

        weak = replace(given, experts=experts | {"again": recipe.Expert(1, 3e-3)})
        with pytest.raises(problems.WeakExpert, match="again: accuracy"):
            prepare.prepare(weak, QUIET)

    def test_what_is_up_to_date_starts_no_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given = replace(recipe.Recipe.read("demo"), out=tmp_path)
        keys = prepare.Keys.of(given)
        experts = {f"models/{task}": key for task, key in keys.experts.items()}
        for product, key in {"texts": keys.texts, "models/base": keys.base, **experts}.items():
            (tmp_path / product).mkdir(parents=True)
            uptodate.Made(tmp_path).note(product, key)
        monkeypatch.setattr(prepare.worker, "start", lambda _: pytest.fail("a process was started"))
        assert not prepare.prepare(given, QUIET).anything


class TestSelectScales:
    def test_candidates_are_scored_on_validation_rows_by_what_their_experts_reach(
        self, finetune: ModuleType, tiny_bert_family: Family, tmp_path: Path
    ) -> None:
        select = load_script("select_scales")
        root = order_task(tmp_path / "project", tiny_bert_family.base)
        how = replace(TINY, frozen_layers=1)
        finetune.make_expert("order", root, recipe.Expert(150, 3e-3), how)
        given = recipe.Recipe(root, {}, how, {"order": recipe.Expert(150, 3e-3)})
        validation = select.Validation(given)
        experts = {"order": 0.5}
        method = {"method": "task_arithmetic", "scale": 9.0}
        found = select.candidates(method, given, [0.0, 1.0], tmp_path)
        untrained, whole = (select.shares(validation, path, experts)[0] for path in found.values())
        assert whole > 1.8 > untrained

        # The test rows decide nothing: they are not even read.
        (root / "texts" / "order" / "test.parquet").unlink()
        select.Validation(given)

    def test_layers_that_were_kept_must_be_those_of_the_base(
        self, finetune: ModuleType, tiny_bert_family: Family, tmp_path: Path
    ) -> None:
        import modelweld

        select = load_script("select_scales")
        root = order_task(tmp_path / "project", tiny_bert_family.base)
        finetune.make_expert("order", root, recipe.Expert(150, 3e-3), TINY)
        given = recipe.Recipe(root, {}, replace(TINY, frozen_layers=1), {"order": recipe.Expert(150, 3e-3)})
        with pytest.raises(SystemExit, match="differs from the base"):
            select.Validation(given).accuracy(modelweld.load(root / "models" / "order"), "order")
