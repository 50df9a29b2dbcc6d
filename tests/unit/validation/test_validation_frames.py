"""Evaluation frames over real files: what is blank, repeated, contradictory, leaked, or foreign to the head."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from modelweld.config import Task, Validate
from modelweld.errors import InputError
from modelweld.validation.row_table import read_column, row_table

NAMES = ("no", "yes")
TASK = Task(model="m", dataset="d")


def write(folder: Path, split: str, texts: list[object], labels: list[object]) -> None:
    folder.mkdir(exist_ok=True)
    pandas.DataFrame({"text": texts, "label": labels}).to_parquet(folder / f"{split}.parquet", index=False)


def frame(folder: Path, task: Task = TASK, names: tuple[str, ...] = NAMES) -> pandas.DataFrame:
    return row_table("t", task, folder, "datasets/d", names, Validate()).frame


def test_same_text_is_the_same_to_a_reader(tmp_path: Path) -> None:
    write(tmp_path, "train", ["Straße  frei"], [0])
    write(tmp_path, "test", ["STRASSE frei", "new", "new\n", "\uff4eew"], [0, 1, 1, 0])
    table = frame(tmp_path)
    assert list(table["leaked"]) == [True, False, False, False]
    assert list(table["repeated"]) == [False, False, True, True]
    assert list(table["contradicted"]) == [False, True, True, True]


def test_empty_texts_are_not_repetitions_of_each_other(tmp_path: Path) -> None:
    write(tmp_path, "train", [""], [0])
    write(tmp_path, "test", ["", "  ", None], [0, 1, 1])
    table = frame(tmp_path)
    assert not table["repeated"].any()
    assert not table["leaked"].any()


def test_no_training_split_no_leakage(tmp_path: Path) -> None:
    write(tmp_path, "test", ["a"], [0])
    assert not frame(tmp_path, TASK.model_copy(update={"train_split": None}))["leaked"].any()
    with pytest.raises(InputError, match=r"no split 'train'; it holds test\.parquet"):
        frame(tmp_path)


@pytest.mark.parametrize(
    ("names", "labels", "numbers", "unknown"),
    [
        (NAMES, [0, 1, 2, -1], [0, 1, None, None], ["2", "-1"]),
        (NAMES, ["yes", "no", "Yes"], [1, 0, None], ["Yes"]),
        (("1", "2", "3"), [1, 3, 0], [0, 2, None], ["0"]),
        (NAMES, [0.5, 1.0], [None, None], ["0.5", "1.0"]),
    ],
)
def test_labels_as_the_head_counts_them(
    tmp_path: Path, names: tuple[str, ...], labels: list[object], numbers: list[int | None], unknown: list[str]
) -> None:
    write(tmp_path, "train", ["other"], [0])
    write(tmp_path, "test", [f"text {row}" for row in range(len(labels))], labels)
    table = frame(tmp_path, names=names)
    assert [None if pandas.isna(value) else int(value) for value in table["label_id"]] == numbers
    assert list(table["unknown_label"].dropna()) == unknown


def test_names_that_the_set_declares_go_before_its_numbers(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no", "perhaps"])})
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 2]}, features=features)
    rows.to_parquet(str(tmp_path / "test.parquet"))
    write(tmp_path, "train", ["other"], [0])
    table = frame(tmp_path)
    assert list(table["label_id"][:2]) == [1, 0]
    assert table["unknown_label"][2] == "2"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_other_formats_read_the_same(tmp_path: Path, suffix: str) -> None:
    rows = pandas.DataFrame({"text": ["NA", 'a, "b"\nc', "null"], "label": [0, 1, 0]})
    for split in ("train", "test"):
        file = tmp_path / f"{split}.{suffix}"
        part = rows if split == "test" else rows.tail(1)
        part.to_csv(file, index=False) if suffix == "csv" else part.to_json(file, orient="records", lines=True)
    table = frame(tmp_path)
    assert list(table["text"]) == list(rows["text"])
    assert list(table["label_id"]) == [0, 1, 0]
    assert list(table["leaked"]) == [False, False, True]


def test_long_rows_of_jsonl_are_read(tmp_path: Path) -> None:
    pandas.DataFrame({"text": ["x" * 3_000_000, "y"]}).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    assert [len(text) for text in read_column(tmp_path / "a.jsonl", "text").values] == [3_000_000, 1]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match=r"cannot be read") as error:
        read_column(tmp_path / "test.parquet", "text")
    assert error.value.where == "test.parquet"
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match="cannot be read"):
        read_column(tmp_path / "empty.csv", "text")
    (tmp_path / "test.csv").write_text("text,label\na,0\n")
    with pytest.raises(InputError, match="no column 'words' among text, label"):
        read_column(tmp_path / "test.csv", "words")
    with pytest.raises(InputError, match=r"more than once: test\.parquet, test\.csv"):
        frame(tmp_path)
