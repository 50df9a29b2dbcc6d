"""Rows are read as they stand, labels mean what the head means, and errors name the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from modelweld.errors import CheckpointError, ConfigError, InputError, SourceError, SourceUnavailable
from modelweld.evaluation.dataset import EvaluationSet, read_set
from modelweld.evaluation.labels import LabelSpace

ROWS = pd.DataFrame({"text": ["one, two", 'a "quoted" word', "None", "naïve – ✓\nnext"], "label": [0, 1, 1, 0]})


def write(folder: Path, kind: str, frame: pd.DataFrame = ROWS, split: str = "test") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.{kind}"
    if kind == "parquet":
        frame.to_parquet(path, index=False)
    elif kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / kind, kind)
    reference = read_set(str(write(tmp_path / "reference", "parquet")), "test", "text", "label")
    for source in (str(tmp_path / kind), str(path)):
        rows = read_set(source, "test", "text", "label")
        assert rows.texts == tuple(ROWS["text"])
        assert rows.labels == tuple(ROWS["label"])
        assert rows.digest() == reference.digest()


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    write(tmp_path, "csv")
    before = read_set(str(tmp_path), "test", "text", "label").digest()
    write(tmp_path, "csv", ROWS.assign(label=[1, 1, 1, 0]))
    assert read_set(str(tmp_path), "test", "text", "label").digest() != before


def test_the_digest_sees_text_label_order_and_boundaries() -> None:
    def digest(texts: tuple[str, ...], labels: tuple[int | str, ...]) -> str:
        return EvaluationSet(texts, labels, None, "").digest()

    variants = [
        digest(("a", "b"), (0, 1)),
        digest(("b", "a"), (1, 0)),
        digest(("a", "b"), (1, 0)),
        digest(("a", "b"), ("0", "1")),
        digest(("ab", ""), (0, 1)),
    ]
    assert len(set(variants)) == len(variants)


def test_missing_things_are_named(tmp_path: Path) -> None:
    write(tmp_path, "parquet", split="train")
    with pytest.raises(InputError, match=r"no split 'test'.*\n.*train\.parquet"):
        read_set(str(tmp_path), "test", "text", "label")
    with pytest.raises(ConfigError, match="no column 'sentence' among text, label"):
        read_set(str(tmp_path), "train", "sentence", "label")
    with pytest.raises(SourceError, match="no such folder or file"):
        read_set(str(tmp_path / "nowhere"), "train", "text", "label")
    write(tmp_path, "csv", split="train")
    with pytest.raises(InputError, match=r"more than once: train\.parquet, train\.csv"):
        read_set(str(tmp_path), "train", "text", "label")
    (tmp_path / "rows.tsv").write_text("a\tb\n")
    with pytest.raises(InputError, match="neither parquet, csv nor jsonl"):
        read_set(str(tmp_path / "rows.tsv"), "train", "text", "label")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"text": ["a", None], "label": [0, 1]}), "row 1: column 'text' holds None"),
        (pd.DataFrame({"text": ["a", "b"], "label": [0.5, 1.0]}), "row 0: column 'label' holds 0.5"),
        (pd.DataFrame({"text": ["a", "b"], "label": pd.array([0, None], dtype="Int64")}), "row 1: column 'label'"),
        (pd.DataFrame({"text": pd.Series([], dtype=str), "label": pd.Series([], dtype=int)}), "no rows"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(tmp_path: Path, frame: pd.DataFrame, message: str) -> None:
    write(tmp_path, "parquet", frame)
    with pytest.raises(InputError, match=message):
        read_set(str(tmp_path), "test", "text", "label")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("parquet", b"PAR1 this is none"),
        ("parquet", b""),
        ("csv", b""),
        ("csv", b"text,label\n"),
        ("jsonl", b""),
        ("csv", b'text,label\n"never closed,1\n'),
        ("jsonl", b'{"text": "a", "label": 0}\n{"text": '),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, kind: str, content: bytes) -> None:
    (tmp_path / f"test.{kind}").write_bytes(content)
    with pytest.raises(InputError):
        read_set(str(tmp_path), "test", "text", "label")


def test_the_hub_out_of_reach_is_an_outside_failure() -> None:
    with pytest.raises(SourceUnavailable, match="hf://nobody/nothing@main: the Hub did not answer"):
        read_set("hf://nobody/nothing@main", "test", "text", "label")


def space(*names: str) -> LabelSpace:
    return LabelSpace(names)


def rows(*labels: int | str, names: tuple[str, ...] | None = None) -> EvaluationSet:
    return EvaluationSet(tuple("x" for _ in labels), labels, names, "set.parquet")


@pytest.mark.parametrize(
    ("head", "data", "expected"),
    [
        (space("neg", "pos"), rows("pos", "neg", "pos"), [1, 0, 1]),
        (space("neg", "pos"), rows(1, 0), [1, 0]),
        (space("neg", "pos"), rows(True, False), [1, 0]),
        # The set's own order of names is not the head's.
        (space("neg", "pos"), rows(0, 1, names=("pos", "neg")), [1, 0]),
        # A head without real names can only be asked by number.
        (space("LABEL_0", "LABEL_1"), rows(0, 1, names=("pos", "neg")), [0, 1]),
        # Star ratings: the integers are the names.
        (space("1", "2", "3"), rows(1, 3, 2), [0, 2, 1]),
        (space("0", "1"), rows("0", 1), [0, 1]),
    ],
)
def test_labels_mean_what_the_head_means(head: LabelSpace, data: EvaluationSet, expected: list[int]) -> None:
    assert head.encode(data, "t").tolist() == expected
    assert head.encode(data, "t").dtype == np.int64


@pytest.mark.parametrize(
    ("head", "data"),
    [
        (space("neg", "pos"), rows("pos", "neutral")),
        (space("neg", "pos"), rows(0, 2)),
        (space("neg", "pos"), rows(0, -1)),
        (space("neg", "pos"), rows(0, 1, names=("neg", "neutral"))),
        (space("1", "2"), rows(1, 0)),
    ],
)
def test_an_unknown_label_names_task_row_and_label(head: LabelSpace, data: EvaluationSet) -> None:
    with pytest.raises(InputError, match=rf"task mails, row 1: label {data.labels[1]!r} is none of") as caught:
        head.encode(data, "mails")
    assert caught.value.where == "set.parquet"


def test_declared_class_names_survive_parquet(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(tmp_path / "test.parquet")
    found = read_set(str(tmp_path), "test", "text", "label")
    assert found.class_names == ("pos", "neg")
    assert space("neg", "pos").encode(found, "t").tolist() == [1, 0]


def test_label_spaces_come_from_configs() -> None:
    assert LabelSpace.from_config({}, "").names == ("LABEL_0", "LABEL_1")
    config: dict[str, Any] = {"id2label": {"1": "b", "0": "a"}, "label2id": {"a": 0, "b": 1}}
    assert LabelSpace.from_config(config, "").names == ("a", "b")
    for spoilt, message in [
        ({"id2label": {"0": "a", "2": "b"}}, "not 0…1"),
        ({"id2label": {"0": "a", "1": "a"}}, "contradict"),
        (config | {"label2id": {"a": 1, "b": 0}}, "contradict"),
        ({"id2label": {"0": "score"}}, "regression"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            LabelSpace.from_config(spoilt, "config.json")
