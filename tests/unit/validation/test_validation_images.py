"""Image sets at the gate: what is broken, blank, repeated, contradictory, leaked, or foreign to the head."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from modelweld.config import Task, Validate
from modelweld.errors import InputError
from modelweld.validation.expectations import check
from modelweld.validation.row_table import row_table
from modelweld.validation.suites import load_suites

NAMES = ("cat", "dog")
TASK = Task(model="m", dataset="d", kind="image-classification")


def picture(seed: int, kind: str = "PNG", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def blank() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(buffer, format="PNG")
    return buffer.getvalue()


def write(folder: Path, split: str, images: list[Any], labels: list[Any]) -> None:
    folder.mkdir(exist_ok=True)
    pandas.DataFrame({"image": images, "label": labels}).to_parquet(folder / f"{split}.parquet", index=False)


def frame(folder: Path) -> pandas.DataFrame:
    return row_table("t", TASK, folder, "datasets/d", NAMES, Validate()).frame


def test_the_same_pixels_are_the_same_image_in_any_encoding(tmp_path: Path) -> None:
    write(tmp_path, "train", [picture(1, "BMP")], ["cat"])
    write(tmp_path, "test", [picture(1), picture(2), picture(2, "BMP"), picture(3)], ["cat", "cat", "dog", "dog"])
    table = frame(tmp_path)
    assert list(table["leaked"]) == [True, False, False, False]
    assert list(table["repeated"]) == [False, False, True, False]
    assert list(table["contradicted"]) == [False, True, True, False]
    assert list(table["label_id"]) == [0, 0, 1, 1]


def test_what_cannot_be_read_is_a_finding_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path, "train", [picture(9)], ["cat"])
    write(tmp_path, "test", [b"junk", None, blank(), picture(1)], ["cat", "dog", "cat", "bird"])
    table = frame(tmp_path)
    assert [bool(one) for one in table["problem"].notna()] == [True, True, False, False]
    assert "no known format" in table["problem"][0]
    assert list(table["uniform"][2:]) == [True, False]
    assert list(table["channels"][2:]) == [3, 1]
    assert table["unknown_label"][3] == "bird"
    assert not table["repeated"].any()


def test_the_shipped_suite_refuses_what_it_says(tmp_path: Path) -> None:
    write(tmp_path, "train", [picture(1)], ["cat"])
    images = [picture(1), picture(2), picture(2), b"junk", picture(3, size=2), blank()]
    write(tmp_path, "test", images, ["cat", "dog", "cat", "dog", "owl", "cat"])
    table = row_table("t", TASK, tmp_path, "datasets/d", NAMES, Validate(min_rows=10))
    failed = {item.expectation: item for item in check([table], load_suites(tmp_path)) if not item.success}
    assert {name for name, item in failed.items() if item.critical} == {
        "enough_images", "images_are_readable", "images_are_larger_than_a_dot", "images_are_higher_than_a_line",
        "image_labels_are_of_the_head", "images_are_distinct",
        "no_image_leaked_from_training",
    }  # fmt: skip
    lesser = {name for name, item in failed.items() if not item.critical}
    assert lesser == {"images_show_something", "image_labels_agree"}
    assert failed["images_are_readable"].where == "datasets/d/test.parquet: row 3"


def test_a_sound_set_passes(tmp_path: Path) -> None:
    write(tmp_path, "train", [picture(seed) for seed in range(100, 110)], ["cat"] * 10)
    write(tmp_path, "test", [picture(seed) for seed in range(60)], ["cat", "dog"] * 30)
    table = row_table("t", TASK, tmp_path, "datasets/d", NAMES, Validate())
    assert all(item.success for item in check([table], load_suites(tmp_path)))


def test_a_missing_column_is_an_error_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "test", [picture(1)], ["cat"])
    with pytest.raises(InputError, match="no column 'photo' among image, label"):
        row_table("t", TASK.model_copy(update={"image": "photo"}), tmp_path, "d", NAMES, Validate())
