"""Image rows are read whatever they are kept in, fed as the model says, and predicted as transformers predicts them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from modelweld.errors import CheckpointError, ConfigError, InputError, SourceError
from modelweld.evaluation.images import image_logits, joint, preprocessing, read_images, top_class
from modelweld.evaluation.labels import LabelSpace
from modelweld.evaluation.settings import Settings
from modelweld.evaluation.systems import System, open_system
from modelweld.images import Unreadable, decode, fingerprint

HOW = Settings(max_length=1, batch_tokens=1, device="cpu")


def pixels(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    return buffer.getvalue()


def write(folder: Path, images: list[Any], labels: list[Any], split: str = "test") -> Path:
    folder.mkdir(exist_ok=True)
    pd.DataFrame({"image": images, "label": labels}).to_parquet(folder / f"{split}.parquet", index=False)
    return folder


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.parametrize(
    "cell",
    [
        encoded(pixels(0)),
        {"bytes": encoded(pixels(0)), "path": None},
        pixels(0).tolist(),
        pixels(0)[:, :, None].tolist(),
        encoded(pixels(0), "BMP"),
    ],
    ids=["png", "struct", "rows", "one channel", "bmp"],
)
def test_an_image_is_the_same_however_it_is_kept(cell: Any) -> None:
    image = decode(cell)
    np.testing.assert_array_equal(np.asarray(image), pixels(0))
    assert fingerprint(image) == fingerprint(decode(encoded(pixels(0))))
    assert fingerprint(image) != fingerprint(decode(encoded(pixels(1))))


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (b"not an image", "in no known format"),
        (encoded(pixels(0))[:60], "damaged"),
        ({"bytes": None, "path": "/etc/passwd"}, "only a path"),
        ([[0, 300]], "0 to 255"),
        ([[0.5, 0.2]], "0 to 255"),
        ([1, 2, 3], "shape"),
        ("text", "no image but str"),
    ],
)
def test_what_is_no_image_says_why(cell: Any, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        decode(cell)


def test_an_image_that_would_fill_the_memory_is_refused() -> None:
    bomb = encoded(np.zeros((9000, 9000), np.uint8))
    assert len(bomb) < 200_000
    with pytest.raises(Unreadable, match="pixels"):
        decode(bomb)


def test_files_that_only_pretend_to_be_images_are_not_opened_by_other_decoders() -> None:
    with pytest.raises(Unreadable, match="no known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")


class TestReading:
    def test_a_row_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "d", [encoded(pixels(0)), b"broken"], ["cat", "dog"])
        with pytest.raises(InputError, match=r"test\.parquet.*row 1: 6 bytes in no known format"):
            read_images(str(folder), "test", "image", "label")

    def test_a_missing_column_names_the_ones_there_are(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "d", [encoded(pixels(0))], ["cat"])
        with pytest.raises(ConfigError, match=r"no column 'img' among image, label"):
            read_images(str(folder), "test", "img", "label")
        with pytest.raises(InputError, match="parquet"):
            read_images(str(folder), "train", "image", "label")
        with pytest.raises(SourceError):
            read_images(str(tmp_path / "none"), "test", "image", "label")

    def test_the_digest_follows_pixels_and_labels_not_the_encoding(self, tmp_path: Path) -> None:
        def digest(name: str, images: list[Any], labels: list[Any]) -> str:
            return read_images(str(write(tmp_path / name, images, labels)), "test", "image", "label").digest()

        both = [pixels(0), pixels(1)]
        png = digest("png", [encoded(one) for one in both], ["cat", "dog"])
        assert png == digest("rows", [one.tolist() for one in both], ["cat", "dog"])
        assert png != digest("turned", [encoded(one) for one in reversed(both)], ["dog", "cat"])
        assert png != digest("told", [encoded(one) for one in both], ["cat", "cat"])

    def test_labels_are_the_heads(self, tmp_path: Path) -> None:
        rows = read_images(
            str(write(tmp_path / "d", [encoded(pixels(i)) for i in range(3)], ["owl", "cat", "owl"])),
            "test", "image", "label",
        )  # fmt: skip
        assert LabelSpace(("cat", "dog", "owl")).encode(rows, "t").tolist() == [2, 0, 2]
        with pytest.raises(InputError, match="row 1: label 'cat'"):
            LabelSpace(("dog", "owl")).encode(rows, "t")


class TestPredicting:
    def test_logits_are_the_models_own_in_any_number_of_batches(self, vit: Path) -> None:
        images = [decode(pixels(seed).tolist()) for seed in range(130)]
        heard: list[int] = []
        found = image_logits(
            open_system(System("x", vit), "image-classification"), preprocessing(vit), images, HOW, heard.append, "x"
        )
        model = ViTForImageClassification.from_pretrained(vit).eval()
        raw = torch.stack([torch.from_numpy(pixels(seed)).float() for seed in range(130)]).unsqueeze(1)
        with torch.inference_mode():
            wanted = model(pixel_values=(raw / 255 - 0.5) / 0.5).logits
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
        assert sum(heard) == 130
        predicted = top_class(found)
        assert predicted.classes.tolist() == wanted.argmax(-1).tolist()

    def test_a_stated_processor_is_obeyed_and_part_of_the_digest(self, vit: Path) -> None:
        before = preprocessing(vit)
        ViTImageProcessorPil(
            do_resize=False, image_mean=[0.25], image_std=[0.5], do_normalize=True
        ).save_pretrained(vit)  # fmt: skip
        stated = preprocessing(vit)
        raw = pixels(3)
        np.testing.assert_allclose(
            stated.pixels([decode(raw.tolist())])[0, 0].numpy(), (raw / 255 - 0.25) / 0.5, atol=1e-6
        )
        assert stated.digest != before.digest

    def test_a_merge_without_a_processor_takes_the_experts(self, vit: Path, tmp_path: Path) -> None:
        expert = tmp_path / "expert"
        expert.mkdir()
        ViTImageProcessorPil(do_resize=False, image_mean=[0.1], image_std=[0.5]).save_pretrained(expert)
        assert preprocessing(vit, expert).digest == preprocessing(expert_with_config(expert, vit)).digest

    def test_other_sizes_are_resized_and_colours_made_grey(self, vit: Path) -> None:
        colour = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
        assert preprocessing(vit).pixels([decode(colour.tolist())]).shape == (1, 1, 8, 8)

    def test_a_lent_head_on_the_same_backbone_is_the_model_itself(self, vit: Path) -> None:
        images = [decode(pixels(seed).tolist()) for seed in range(3)]
        own, lent = (
            image_logits(
                open_system(system, "image-classification"), preprocessing(vit), images, HOW, lambda _: None, "x"
            )
            for system in (System("own", vit), System("lent", vit, head_from=vit))
        )
        np.testing.assert_array_equal(own, lent)

    def test_an_image_model_does_not_read_texts(self, vit: Path) -> None:
        with pytest.raises(CheckpointError, match="classifies no texts"):
            open_system(System("x", vit))

    def test_a_processor_that_is_none_is_refused(self, vit: Path) -> None:
        (vit / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
            preprocessing(vit)

    def test_not_finite_outputs_are_refused(self, vit: Path) -> None:
        model = open_system(System("x", vit), "image-classification")
        with torch.no_grad():
            model.classifier.bias[0] = float("nan")
        with pytest.raises(CheckpointError, match="not finite"):
            image_logits(model, preprocessing(vit), [decode(pixels(0).tolist())], HOW, lambda _: None, "x")


def expert_with_config(folder: Path, vit: Path) -> Path:
    (folder / "config.json").write_bytes((vit / "config.json").read_bytes())
    return folder


def test_jointly_the_most_certain_head_answers() -> None:
    first = np.array([[5.0, 0.0], [0.0, 1.0]], np.float32)
    second = np.array([[0.0, 1.0], [0.0, 4.0]], np.float32)
    assert joint([first, second]).classes.tolist() == [0, 3]
    with pytest.raises(InputError, match="different rows"):
        joint([first, second[:1]])
