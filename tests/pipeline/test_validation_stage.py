"""The validate stage over real files: what is sound passes, and each kind of spoiled input is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file

from modelweld.config import load_params
from modelweld.errors import ConfigError, GateRefused
from modelweld.sources import LOCK_NAME, pin
from modelweld.stages.validate import validate
from tests.conftest import Family, pipeline_params

Spoil = Callable[["Project", str], None]
Found = set[tuple[str, str]]


class Project:
    """A project folder with a tiny family in models/ and datasets/, to be spoiled."""

    def __init__(self, root: Path, family: Family) -> None:
        self.root = root
        shutil.copytree(family.root / "models", root / "models")
        shutil.copytree(family.root / "datasets", root / "datasets")
        self.family = Family(root, family.tasks)
        self.params()

    def params(self, **changes: object) -> None:
        (self.root / "params.yaml").write_text(pipeline_params(self.family, **changes))

    @property
    def document(self) -> dict[str, Any]:
        return dict(json.loads((self.root / "params.yaml").read_text()))

    def weights(self, model: str) -> Path:
        return self.root / "models" / model / "model.safetensors"

    def edit(self, model: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.weights(model))
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.weights(model))

    def json(self, path: str, change: Callable[[dict[str, Any]], object]) -> None:
        document = json.loads((self.root / path).read_text())
        change(document)
        (self.root / path).write_text(json.dumps(document))

    def rows(self, path: str, change: Callable[[pandas.DataFrame], pandas.DataFrame]) -> None:
        file = self.root / "datasets" / path
        change(pandas.read_parquet(file)).to_parquet(file, index=False)

    def lock(self) -> None:
        """Pin what stands in models/ and datasets/ now, as a fetch of it would have left it."""
        lock = pin(load_params(self.root / "params.yaml"), self.root, None)
        lock.write(self.root / LOCK_NAME)

    def validate(self) -> dict[str, Any]:
        return validate(self.root / "params.yaml", self.root)

    @property
    def gate(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.root / "validation/gate.json").read_text())
        return document

    def failed(self, *, critical: bool = True) -> Found:
        return {
            (item["subject"], item["expectation"])
            for item in self.gate["results"]
            if not item["success"] and item["critical"] is critical
        }

    def result(self, subject: str, expectation: str) -> dict[str, Any]:
        [found] = [i for i in self.gate["results"] if (i["subject"], i["expectation"]) == (subject, expectation)]
        return dict(found)


@pytest.fixture
def project(tiny_bert_family: Family, tmp_path: Path) -> Project:
    return Project(tmp_path / "project", tiny_bert_family)


def test_a_sound_project_passes_with_docs_and_inventory(project: Project) -> None:
    project.lock()
    summary = project.validate()
    assert summary["verdict"] == project.gate["verdict"] == "pass"
    assert summary["warnings"] == []
    assert summary["checks"] == len(project.gate["results"]) > 80
    assert {item["subject"] for item in project.gate["results"]} == {
        *("model:animal", "model:base", "model:colour", "dataset:animal", "dataset:colour", "task:animal"),
        "task:colour",
    }
    assert Path(summary["data_docs"]).is_file()
    pages = list((project.root / ".modelweld/data-docs/validations").rglob("*.html"))
    assert len(pages) == 13, "a page for each of the tables: 5 directories, 3 models twice, 2 tasks"
    inventory = pandas.read_csv(project.root / ".modelweld/inventory/colour.csv")
    assert {"backbone", "head"} == set(inventory["role"])


def test_the_gate_file_is_the_same_in_another_place_and_at_another_time(
    tiny_bert_family: Family, tmp_path: Path
) -> None:
    written = []
    for name in ("here", "there/below"):
        project = Project(tmp_path / name, tiny_bert_family)
        project.edit("colour", lambda t: t["bert.pooler.dense.weight"].fill_(torch.nan))
        project.weights("animal").write_bytes(b"short")
        for _ in range(2):
            with pytest.raises(GateRefused):
                project.validate()
            written.append((project.root / "validation/gate.json").read_bytes())
    assert len(set(written)) == 1
    assert str(tmp_path).encode() not in written[0]


WEIGHT = "bert.encoder.layer.0.output.dense.weight"


def nan(project: Project, name: str) -> None:
    project.edit(name, lambda t: t[WEIGHT][2].fill_(float("nan")))


def infinite_head(project: Project, name: str) -> None:
    project.edit(name, lambda t: t["classifier.weight"][0].fill_(float("inf")))


def other_architecture(project: Project, name: str) -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=34, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    DistilBertForSequenceClassification(config).save_pretrained(project.root / "models" / name)


def other_heads(project: Project, name: str) -> None:
    project.json(f"models/{name}/config.json", lambda config: config.update(num_attention_heads=8))


def other_vocabulary_size(project: Project, name: str) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        table = "bert.embeddings.word_embeddings.weight"
        tensors[table] = torch.cat([tensors[table], tensors[table][:3]])

    project.edit(name, grow)
    project.json(f"models/{name}/config.json", lambda config: config.update(vocab_size=config["vocab_size"] + 3))


def other_vocabulary(project: Project, name: str) -> None:
    def swap(document: dict[str, Any]) -> None:
        vocabulary = document["model"]["vocab"]
        vocabulary["the"], vocabulary["very"] = vocabulary["very"], vocabulary["the"]

    project.json(f"models/{name}/tokenizer.json", swap)


def lower_casing(project: Project, name: str) -> None:
    project.json(f"models/{name}/tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"}))


def token_without_embedding(project: Project, name: str) -> None:
    project.json(f"models/{name}/tokenizer.json", lambda t: t["model"]["vocab"].update(extra=40))


def missing_tensor(project: Project, name: str) -> None:
    project.edit(name, lambda t: t.pop("bert.encoder.layer.1.attention.self.query.weight"))


def extra_tensor(project: Project, name: str) -> None:
    project.edit(name, lambda t: t.update({"bert.encoder.layer.2.output.dense.weight": torch.rand(32, 64)}))


def other_shape(project: Project, name: str) -> None:
    project.edit(name, lambda t: t.update({"bert.encoder.layer.0.intermediate.dense.bias": torch.zeros(60)}))


def quantised(project: Project, name: str) -> None:
    project.edit(name, lambda t: t.update({WEIGHT: (t[WEIGHT] * 100).to(torch.int8)}))


def equal_to_base(project: Project, name: str) -> None:
    base = load_file(project.weights("base"))
    project.edit(name, lambda t: t.update({f"bert.{key}": tensor for key, tensor in base.items()}))


def equal_to_another(project: Project, name: str) -> None:
    other = {key: value for key, value in load_file(project.weights("animal")).items() if key.startswith("bert.")}
    project.edit(name, lambda t: t.update(other))


def from_another_base(project: Project, name: str) -> None:
    def renew(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(7)
        for key, tensor in tensors.items():
            if tensor.ndim == 2 and key.startswith("bert."):
                tensors[key] = 0.02 * torch.randn(tensor.shape, generator=generator)

    project.edit(name, renew)


def truncated(project: Project, name: str) -> None:
    raw = project.weights(name).read_bytes()
    project.weights(name).write_bytes(raw[: len(raw) // 2])


def corrupt_header(project: Project, name: str) -> None:
    raw = bytearray(project.weights(name).read_bytes())
    raw[8:40] = b"\xff" * 32
    project.weights(name).write_bytes(bytes(raw))


def no_weights(project: Project, name: str) -> None:
    project.weights(name).unlink()


def pickled(project: Project, name: str) -> None:
    torch.save(load_file(project.weights(name)), project.root / "models" / name / "pytorch_model.bin")
    project.weights(name).unlink()


def no_config(project: Project, name: str) -> None:
    (project.root / "models" / name / "config.json").unlink()


def broken_config(project: Project, name: str) -> None:
    (project.root / "models" / name / "config.json").write_text('{"model_type": ')


def broken_tokenizer(project: Project, name: str) -> None:
    (project.root / "models" / name / "tokenizer.json").write_text("{}")


def contradicting_labels(project: Project, name: str) -> None:
    project.json(f"models/{name}/config.json", lambda config: config.update(label2id={"red": 1, "blue": 0}))


def small_head(project: Project, name: str) -> None:
    project.edit(name, lambda t: t.update({"classifier.weight": torch.rand(1, 32), "classifier.bias": torch.rand(1)}))


def no_head(project: Project, name: str) -> None:
    project.edit(name, lambda t: [t.pop("classifier.weight"), t.pop("classifier.bias")])


def model_gone(project: Project, name: str) -> None:
    shutil.rmtree(project.root / "models" / name)


def label_out_of_range(project: Project, name: str) -> None:
    project.rows(f"{name}/test.parquet", lambda f: f.assign(label=f["label"].where(f.index != 5, 7)))


def label_missing(project: Project, name: str) -> None:
    project.rows(f"{name}/test.parquet", lambda f: f.assign(label=f["label"].astype("Int64").where(f.index != 5)))


def blank_row(project: Project, name: str) -> None:
    project.rows(f"{name}/test.parquet", lambda f: f.assign(text=f["text"].where(f.index != 4, "  \n")))


def null_row(project: Project, name: str) -> None:
    project.rows(f"{name}/test.parquet", lambda f: f.assign(text=f["text"].where(f.index != 4)))


def duplicates(project: Project, name: str) -> None:
    project.rows(f"{name}/test.parquet", lambda f: pandas.concat([f, f.head(2)]))


def leakage(project: Project, name: str) -> None:
    held = pandas.read_parquet(project.root / "datasets" / name / "train.parquet").head(3)
    held["text"] = held["text"].str.upper() + " "
    project.rows(f"{name}/test.parquet", lambda f: pandas.concat([f, held]))


def too_few(project: Project, name: str) -> None:
    project.rows(f"{name}/test.parquet", lambda f: f.head(49))


def no_rows(project: Project, name: str) -> None:
    project.rows(f"{name}/test.parquet", lambda f: f.head(0))


def no_split(project: Project, name: str) -> None:
    (project.root / "datasets" / name / "test.parquet").unlink()


def no_train_split(project: Project, name: str) -> None:
    (project.root / "datasets" / name / "train.parquet").unlink()


def no_column(project: Project, name: str) -> None:
    project.rows(f"{name}/test.parquet", lambda f: f.rename(columns={"label": "class"}))


def corrupt_data(project: Project, name: str) -> None:
    (project.root / "datasets" / name / "test.parquet").write_bytes(b"PAR1 and nothing more")


def dataset_gone(project: Project, name: str) -> None:
    shutil.rmtree(project.root / "datasets" / name)


def foreign_model(project: Project, name: str = "left-over") -> None:
    shutil.copytree(project.root / "models/colour", project.root / "models" / name)


# How each model is spoiled, what must refuse it, and what the refusal must point at below its directory.
MODELS: list[tuple[Spoil, set[str], str]] = [
    (nan, {"tensors_are_finite"}, f": tensor {WEIGHT}"),
    (infinite_head, {"tensors_are_finite"}, ": tensor classifier.weight"),
    (
        other_architecture,
        {"same_architecture", "no_tensor_is_missing", "no_tensor_is_extra", "finetuned_from_base"},
        "",
    ),
    (other_heads, {"same_configuration"}, ""),
    (other_vocabulary_size, {"same_vocabulary_size", "same_shapes"}, ""),
    (other_vocabulary, {"same_vocabulary", "same_tokenization"}, ""),
    (lower_casing, {"same_tokenization"}, ""),
    (token_without_embedding, {"same_vocabulary", "tokens_have_embeddings"}, ""),
    (missing_tensor, {"no_tensor_is_missing"}, ": tensor encoder.layer.1.attention.self.query.weight"),
    (extra_tensor, {"no_tensor_is_extra"}, ": tensor bert.encoder.layer.2.output.dense.weight"),
    (other_shape, {"same_shapes"}, ": tensor bert.encoder.layer.0.intermediate.dense.bias"),
    (quantised, {"same_dtype_class"}, f": tensor {WEIGHT}"),
    (equal_to_base, {"differs_from_base"}, ""),
    (equal_to_another, {"differs_from_other_experts"}, ""),
    (from_another_base, {"finetuned_from_base"}, ""),
    (truncated, {"source_can_be_read"}, ""),
    (corrupt_header, {"source_can_be_read"}, ""),
    (no_weights, {"source_can_be_read"}, ""),
    (pickled, {"source_can_be_read"}, ""),
    (no_config, {"architecture_is_stated", "no_tensor_is_extra", "head_fits_its_labels"}, ""),
    (broken_config, {"source_can_be_read"}, ""),
    (broken_tokenizer, {"source_can_be_read"}, ""),
    (contradicting_labels, {"source_can_be_read"}, ""),
    (small_head, {"head_fits_its_labels"}, ""),
    (no_head, {"head_fits_its_labels"}, ""),
    (model_gone, {"source_can_be_read"}, ""),
]
DATA: list[tuple[Spoil, str, str]] = [
    (label_out_of_range, "labels_are_of_the_head", ": row 5"),
    (label_missing, "labels_are_present", ": row 5"),
    (blank_row, "texts_are_not_blank", ": row 4"),
    (null_row, "texts_are_present", ": row 4"),
    (duplicates, "texts_are_distinct", ": row 60, 61"),
    (leakage, "nothing_leaked_from_training", ": row 60, 61, 62"),
    (too_few, "enough_rows", ""),
    (no_rows, "enough_rows", ""),
    (no_split, "source_can_be_read", "no split 'test'; it holds train.parquet, validation.parquet"),
    (no_train_split, "source_can_be_read", "no split 'train'; it holds test.parquet, validation.parquet"),
    (no_column, "source_can_be_read", "test.parquet: no column 'label' among text, class"),
    (corrupt_data, "source_can_be_read", "test.parquet: cannot be read: "),
    (dataset_gone, "source_can_be_read", "no such directory"),
]


@pytest.fixture(scope="module")
def museum(tiny_bert_family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, GateRefused]:
    """A project in which every model and every dataset is spoiled in its own way, and what one run says to it.

    One run, because each pays for hundreds of expectations; that the findings keep apart is part of what is tested.
    """
    project = Project(tmp_path_factory.mktemp("museum") / "project", tiny_bert_family)
    models, datasets, tasks = dict(project.document["models"]), {}, {}
    for number, (spoil, _, _) in enumerate(MODELS):
        name = spoil.__name__
        shutil.copytree(project.root / "models/colour", project.root / "models" / name)
        generator = torch.Generator().manual_seed(number)

        def move(tensors: dict[str, torch.Tensor], generator: torch.Generator = generator) -> None:
            tensors[WEIGHT] += 1e-4 * torch.randn(tensors[WEIGHT].shape, generator=generator)

        project.edit(name, move)
        spoil(project, name)
        models[name] = {"uri": f"models/{name}", "licence": "mit"}
        tasks[name] = {"model": name, "dataset": "colour"}
    for case, _, _ in DATA:
        name = case.__name__
        shutil.copytree(project.root / "datasets/colour", project.root / "datasets" / name)
        case(project, name)
        datasets[name] = {"uri": f"datasets/{name}", "licence": "mit"}
        tasks[name] = {"model": "colour", "dataset": name}
    (project.root / "datasets/stray.parquet").write_bytes(b"")
    foreign_model(project)
    datasets |= project.document["datasets"]
    project.params(models=models, datasets=datasets, tasks=tasks | project.document["tasks"])
    with pytest.raises(GateRefused) as error:
        project.validate()
    return project, error.value


@pytest.mark.parametrize(("spoil", "expected", "where"), MODELS, ids=[case[0].__name__ for case in MODELS])
def test_a_spoiled_model_is_refused_by_name(
    museum: tuple[Project, GateRefused], spoil: Spoil, expected: set[str], where: str
) -> None:
    project, subject = museum[0], f"model:{spoil.__name__}"
    assert {rule for found, rule in project.failed() if found == subject} == expected
    for rule in expected:
        result = project.result(subject, rule)
        assert f"models/{spoil.__name__}{where}" in result["where"]
        assert result["hint"]


@pytest.mark.parametrize(("spoil", "rule", "told"), DATA, ids=[case[0].__name__ for case in DATA])
def test_spoiled_data_is_refused_by_name(
    museum: tuple[Project, GateRefused], spoil: Spoil, rule: str, told: str
) -> None:
    project, name = museum[0], spoil.__name__
    unread = rule == "source_can_be_read"
    subject = f"dataset:{name}" if unread else f"task:{name}"
    assert {failed for failed in project.failed() if failed[0].endswith(f":{name}")} == {(subject, rule)}
    result = project.result(subject, rule)
    assert result["hint"]
    if unread:
        assert told in result["observed"]
        assert result["where"] == f"datasets/{name}"
    else:
        assert f"datasets/{name}/test.parquet{told}" in result["where"]


def test_what_was_sound_among_the_spoiled_is_not_blamed(museum: tuple[Project, GateRefused]) -> None:
    project, error = museum
    blamed = {subject for subject, _ in project.failed()}
    spoiled = {f"model:{case[0].__name__}" for case in MODELS} | {"model:left-over", "dataset:stray.parquet"}
    spoiled |= {f"{'dataset' if rule == 'source_can_be_read' else 'task'}:{case.__name__}" for case, rule, _ in DATA}
    # It is the one that another was made equal to.
    assert blamed == spoiled | {"model:animal"}
    assert project.result("model:animal", "differs_from_other_experts")["observed"] == "equal_to_another"
    assert project.gate["verdict"] == "fail"
    assert "more in the gate file" in error.what
    assert (project.root / ".modelweld/data-docs/index.html").is_file()


def test_unexpected_directories_are_refused_without_a_lock_too(museum: tuple[Project, GateRefused]) -> None:
    found = museum[0].result("dataset:stray.parquet", "source_is_pinned")
    assert (found["success"], found["where"]) == (False, "datasets/stray.parquet")
    assert "rm -r models/left-over" in museum[0].result("model:left-over", "source_is_pinned")["hint"]


def test_a_spoiled_base_is_refused_by_name(project: Project) -> None:
    project.edit("base", lambda t: t["pooler.dense.weight"][0].fill_(float("nan")))
    with pytest.raises(GateRefused) as error:
        project.validate()
    assert project.failed() == {("model:base", "tensors_are_finite")}
    assert "models/base: tensor pooler.dense.weight" in error.value.what
    assert "tensors_are_finite" in error.value.what


def test_without_a_base_nothing_is_said_of_the_experts(project: Project) -> None:
    shutil.rmtree(project.root / "models/base")
    with pytest.raises(GateRefused):
        project.validate()
    assert project.failed() == {("model:base", "source_can_be_read")}
    assert not [item for item in project.gate["results"] if item["expectation"] == "finetuned_from_base"]


def test_a_changed_byte_a_stray_shard_and_a_foreign_folder_are_seen_against_the_lock(project: Project) -> None:
    project.lock()
    raw = bytearray(project.weights("colour").read_bytes())
    raw[-1] ^= 1
    project.weights("colour").write_bytes(bytes(raw))
    (project.root / "models/animal/model-00002-of-00002.safetensors").write_bytes(b"foreign")
    foreign_model(project)
    with pytest.raises(GateRefused):
        project.validate()
    assert project.failed() == {
        ("model:colour", "files_are_as_pinned"),
        ("model:animal", "files_are_as_pinned"),
        ("model:left-over", "source_is_pinned"),
    }
    assert "other bytes" in project.result("model:colour", "files_are_as_pinned")["observed"]
    assert "was not pinned" in project.result("model:animal", "files_are_as_pinned")["observed"]
    assert "rm -r models/left-over" in project.result("model:left-over", "source_is_pinned")["hint"]


def test_a_source_that_was_never_pinned_is_refused(project: Project) -> None:
    project.lock()
    document = json.loads((project.root / LOCK_NAME).read_text())
    del document["pinned"]["model-colour"]
    (project.root / LOCK_NAME).write_text(json.dumps(document))
    with pytest.raises(GateRefused):
        project.validate()
    assert project.failed() == {("model:colour", "source_is_pinned")}


def test_thresholds_of_params_decide(project: Project) -> None:
    duplicates(project, "colour")
    leakage(project, "colour")
    project.params(validate={"max_duplicates": 0.04, "max_leakage": 0.05, "max_relative_delta": 0.05})
    with pytest.raises(GateRefused):
        project.validate()
    assert project.failed() == {("model:colour", "finetuned_from_base"), ("model:animal", "finetuned_from_base")}


def test_another_precision_and_an_unknown_licence_only_warn(project: Project) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})

    project.edit("colour", halve)
    models = {name: {"uri": f"models/{name}"} for name in ("base", "colour", "animal")}
    project.params(models=models)
    summary = project.validate()
    assert summary["verdict"] == "pass"
    expected = {(f"model:{name}", "licence_known") for name in models} | {("model:colour", "same_dtype")}
    assert project.failed(critical=False) == expected
    assert len(summary["warnings"]) == len(expected)


def test_the_projects_own_suite_is_applied(project: Project) -> None:
    (project.root / "expectations").mkdir()
    (project.root / "expectations/tensors.yaml").write_text("""
table: tensors
extends: default
expectations:
  - id: norms_are_small
    type: expect_column_values_to_be_between
    kwargs: {column: norm, max_value: 0.000001}
    hint: "shrink {name}"
""")
    with pytest.raises(GateRefused):
        project.validate()
    assert ("model:colour", "norms_are_small") in project.failed()
    assert project.result("model:colour", "norms_are_small")["hint"] == "shrink colour"


@pytest.mark.parametrize(
    ("kind", "kwargs", "told"),
    [
        ("expect_column_values_to_be_small", "{column: norm}", "no 'expect_column_values_to_be_small'"),
        ("expect_column_values_to_be_between", "{colum: norm}", "kwargs"),
        ("expect_column_values_to_be_between", "{column: nrm, max_value: 1}", "cannot be checked"),
    ],
)
def test_a_check_that_cannot_be_made_is_an_error_not_a_verdict(
    project: Project, kind: str, kwargs: str, told: str
) -> None:
    (project.root / "expectations").mkdir()
    text = f"table: tensors\nexpectations:\n  - {{id: odd, type: {kind}, kwargs: {kwargs}, hint: none}}\n"
    (project.root / "expectations/tensors.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told) as error:
        project.validate()
    assert error.value.where == "expectations/tensors.yaml: odd"
    assert not (project.root / "validation/gate.json").exists()


def test_nothing_of_the_last_run_stays_in_the_docs(project: Project) -> None:
    foreign_model(project)
    with pytest.raises(GateRefused):
        project.validate()
    shutil.rmtree(project.root / "models/left-over")
    project.validate()
    folder = project.root / ".modelweld/data-docs"
    assert not [page for page in folder.rglob("*") if "left-over" in str(page)]
    assert "left-over" not in (folder / "index.html").read_text()
