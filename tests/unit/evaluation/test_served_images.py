"""What a served image model takes: bytes, base64, arrays; and files only where the server opened a directory."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from modelweld.errors import InputError
from modelweld.evaluation.kinds import kind_of
from modelweld.evaluation.served_images import ROOT_VARIABLE, decode_served
from tests.support.pictures import png

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
ENCODED = png(PIXELS)
TEXT = base64.b64encode(ENCODED).decode()


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)


@pytest.mark.parametrize(
    "cell",
    [
        ENCODED,
        bytearray(ENCODED),
        TEXT,
        f"data:image/png;base64,{TEXT}",
        PIXELS,
        PIXELS.tolist(),
        {"bytes": ENCODED, "path": "/etc/passwd"},
        {"bytes": TEXT},
    ],
)
def test_every_form_is_the_same_image(cell: Any) -> None:
    (image,) = decode_served([cell])
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize(
    "model_input",
    [
        pandas.DataFrame({"image": [ENCODED, ENCODED]}),
        pandas.DataFrame({"image": list(np.stack([PIXELS, PIXELS]))}),
        {"image": [ENCODED, TEXT]},
        {"image": np.stack([PIXELS, PIXELS])},
        [ENCODED, PIXELS],
        np.stack([PIXELS, PIXELS]),
        # What MLflow makes of {"image": [two strings]}: one row that holds the list.
        pandas.DataFrame([{"image": [TEXT, TEXT]}]),
    ],
)
def test_every_container_gives_its_rows(model_input: Any) -> None:
    images = kind_of("image-classification").served_rows(model_input)
    assert len(images) == 2
    for image in images:
        np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (b"junk", "no known format"),
        ("images/cat.png", "not base64"),
        ("data:text/html,<b>", "not base64"),
        (None, "no image but NoneType"),
        (PIXELS.astype(np.float32) / 255, "whole numbers"),
        ([[1, 2], [3]], "differ in length"),
        (PIXELS[:, 0], "3 pixels"),
        ({"path": "cat.png"}, "opens none"),
        (Path("cat.png"), "opens none"),
    ],
)
def test_what_is_no_image_is_named_by_row(cell: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"row 1: .*{message}"):
        decode_served([ENCODED, cell])


def test_one_image_that_is_not_in_a_list_is_not_taken_for_many(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one image goes into a list of one"):
        kind_of("image-classification").served_rows({"image": PIXELS})


def test_another_column_is_named() -> None:
    with pytest.raises(InputError, match="no column 'image' among: picture"):
        kind_of("image-classification").served_rows({"picture": [ENCODED]})


class TestPaths:
    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        root = tmp_path / "open"
        (root / "sub").mkdir(parents=True)
        (root / "sub" / "cat.png").write_bytes(ENCODED)
        (tmp_path / "secret.png").write_bytes(ENCODED)
        monkeypatch.setenv(ROOT_VARIABLE, str(root))
        return root

    def test_files_below_the_open_directory_are_read(self, root: Path) -> None:
        images = decode_served([{"path": "sub/cat.png"}, {"bytes": None, "path": str(root / "sub" / "cat.png")}])
        assert [image.size for image in images] == [(6, 8), (6, 8)]

    @pytest.mark.parametrize(
        "path",
        ["../secret.png", "sub/../../secret.png", "link.png", "folder/secret.png", "sub", "absent.png", "", "\0", 7],
    )
    def test_nothing_else_is(self, root: Path, path: Any) -> None:
        (root / "link.png").symlink_to(root.parent / "secret.png")
        (root / "folder").symlink_to(root.parent)
        with pytest.raises(InputError, match=r"row 0: (no readable file below|a path that is int)"):
            decode_served([{"path": path}])

    def test_nor_an_absolute_path(self, root: Path) -> None:
        secret = root.parent / "secret.png"
        assert secret.is_file()
        with pytest.raises(InputError, match="no readable file below"):
            decode_served([{"path": str(secret)}])

    def test_an_unreadable_image_is_named_and_its_bytes_are_not_shown(self, root: Path) -> None:
        (root / "notes.txt").write_text("a password")
        with pytest.raises(InputError) as caught:
            decode_served([{"path": "notes.txt"}])
        assert "no known format" in str(caught.value)
        assert "password" not in str(caught.value)
