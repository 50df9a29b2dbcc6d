"""The table of task kinds: every entry is complete, and the configuration follows it."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from modelweld import kinds
from modelweld.config import Params, Task
from modelweld.config.align import Rows
from modelweld.errors import ConfigError
from modelweld.evaluation.dataset_spec import DatasetSpec
from modelweld.evaluation.kinds import kind_of
from modelweld.evaluation.kinds.base import TaskKind
from modelweld.evaluation.labels import LabelSpace
from modelweld.evaluation.metrics import Resampling, score_systems
from modelweld.kinds import KINDS


@pytest.mark.parametrize("name", KINDS)
def test_every_entry_has_its_behaviour_and_its_suite(name: str) -> None:
    kind, declared = kind_of(name), KINDS[name]
    assert isinstance(kind, TaskKind)
    assert kind.name == name
    assert kind.declaration is declared
    assert declared.inputs
    assert declared.metrics
    suite = yaml.safe_load((files("modelweld.validation") / "suites" / f"{declared.suite}.yaml").read_text())
    assert suite["table"] == declared.suite
    named = {
        value
        for item in suite["expectations"]
        for key, value in item["kwargs"].items()
        if key in ("column", "column_A", "column_B")
    }
    columns = {"row", "repeated", "contradicted", "leaked", *kind.finding_types, *kind.target_types}
    assert named <= columns


def test_an_unknown_kind_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no kind of task is called 'speech'.*text-classification"):
        kind_of("speech")
    with pytest.raises(ValidationError, match="'text-classification' or 'image-classification'"):
        Task(model="m", dataset="d", kind="speech")


def test_the_table_loads_nothing() -> None:
    code = "import sys, modelweld.kinds; print(sorted({'torch', 'pydantic', 'pandas', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_texts_load_no_image_library() -> None:
    code = (
        "import sys; from modelweld.evaluation.kinds import kind_of; kind_of('text-classification'); "
        "print('modelweld.evaluation.images' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_columns_are_told_by_role() -> None:
    task = Task(model="m", dataset="d", text="body", columns={"label": "folder"})
    assert task.columns_by_role == {"text": "body", "label": "folder"}
    spec = DatasetSpec.of_task(task, files("modelweld"))  # type: ignore[arg-type]
    assert (spec.column("text"), spec.column("label"), spec.column("image")) == ("body", "folder", "image")
    with pytest.raises(ValidationError, match="text-classification has no 'image', only text, label"):
        Task(model="m", dataset="d", columns={"image": "photo"})
    with pytest.raises(ValidationError, match=r"columns\.text and text name two columns"):
        Task(model="m", dataset="d", text="body", columns={"text": "subject"})


def test_a_kind_is_told_by_a_column_that_only_it_has() -> None:
    assert kinds.implied_by({"image"}) == "image-classification"
    assert kinds.implied_by({"text", "label"}) is None
    assert Rows(dataset="d").task_kind == "text-classification"
    assert Rows(dataset="d", image="photo").task_kind == "image-classification"
    assert Rows(dataset="d", kind="image-classification").task_kind == "image-classification"


def test_rows_of_an_alignment_are_written_as_0_1_0_wrote_them() -> None:
    rows = Task(model="m", dataset="d", kind="image-classification", image="photo").rows("datasets/d", "train")
    assert rows.model_dump() == {
        "dataset": "datasets/d", "split": "train", "text": "text", "image": "photo", "label": "label",
    }  # fmt: skip
    assert Rows(dataset="d", kind="image-classification").model_dump()["kind"] == "image-classification"


def test_scores_no_better_than_the_most_frequent_class_are_doubted() -> None:
    truth, space = np.array([0, 0, 0, 1, 2]), LabelSpace(("cat", "dog", "cow"))
    answers = {
        "base": np.array([1, 1, 1, 1, 1]),
        "expert": truth,
        "average": np.array([0, 0, 0, 0, 0]),
        "merged": np.array([0, 0, 1, 1, 1]),
    }
    scored = score_systems(truth, answers, dict.fromkeys(answers, "d"), "accuracy", Resampling(0, 0.9, 0), "task t")
    (doubt,) = kind_of("text-classification").doubts(truth, scored, space)
    assert doubt == "average, merged: accuracy is at or below 0.600, that of always answering 'cat'"
    del scored["average"], scored["merged"]
    assert kind_of("image-classification").doubts(truth, scored, space) == []


def test_a_metric_that_a_kind_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = KINDS["image-classification"]
    only_accuracy = {**declared.__dict__, "metrics": (kinds.Metric("accuracy"),)}
    monkeypatch.setitem(KINDS, "image-classification", kinds.Declaration(**only_accuracy))
    document = {
        "name": "n",
        "models": {"base": {"uri": "b"}, "e": {"uri": "e"}},
        "datasets": {"d": {"uri": "d"}},
        "tasks": {"t": {"model": "e", "dataset": "d", "kind": "image-classification"}},
        "validate": {},
        "merge": {"method": "average"},
        "baselines": {},
        "evaluate": {"metric": "macro_f1"},
    }
    with pytest.raises(ValidationError, match=r"image-classification \(tasks\.t\) is scored by accuracy"):
        Params.model_validate(document)
