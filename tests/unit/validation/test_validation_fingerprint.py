"""Tokenizers are told apart by what they do, labels are read as the head counts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelweld.errors import CheckpointError
from modelweld.validation.fingerprint import config_differences, label_names, tokenizing

VOCABULARY = {word: number for number, word in enumerate(["[UNK]", "the", "quick", "fox", "[CLS]", "[SEP]"])}


def save(folder: Path, vocabulary: dict[str, int], *, lower: bool = False, cut: bool = False) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    if cut:
        tokenizer.enable_truncation(8)
        tokenizer.enable_padding(length=8)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_truncation_and_padding_do_not_make_another_tokenizer(tmp_path: Path) -> None:
    assert tokenizing(save(tmp_path / "a", VOCABULARY)) == tokenizing(save(tmp_path / "b", VOCABULARY, cut=True))


def test_lower_casing_does(tmp_path: Path) -> None:
    plain, lower = (
        tokenizing(save(tmp_path / "a", VOCABULARY)),
        tokenizing(save(tmp_path / "b", VOCABULARY, lower=True)),
    )
    assert plain.vocabulary == lower.vocabulary
    assert plain.cuts != lower.cuts


def test_a_word_list_has_the_vocabulary_of_its_tokenizer(tmp_path: Path) -> None:
    whole = tokenizing(save(tmp_path / "a", VOCABULARY))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    words = tokenizing(tmp_path)
    assert words.vocabulary == whole.vocabulary
    assert words.highest_token == whole.highest_token == 5
    assert words.cuts is None


def test_other_ids_are_another_vocabulary(tmp_path: Path) -> None:
    swapped = {**VOCABULARY, "quick": VOCABULARY["fox"], "fox": VOCABULARY["quick"]}
    assert (
        tokenizing(save(tmp_path / "a", VOCABULARY)).vocabulary != tokenizing(save(tmp_path / "b", swapped)).vocabulary
    )


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(CheckpointError, match="not a readable tokenizer") as error:
        tokenizing(tmp_path)
    assert error.value.where == str(tmp_path / "tokenizer.json")


def test_no_tokenizer_is_no_fingerprint(tmp_path: Path) -> None:
    assert tokenizing(tmp_path).vocabulary is None


def test_only_what_both_say_is_compared() -> None:
    base = {"hidden_size": 64, "layer_norm_eps": 1e-12, "_name_or_path": "a"}
    assert config_differences({"hidden_size": 64, "rope_theta": 1.0, "_name_or_path": "b"}, base) == ""
    assert config_differences({"hidden_size": 32}, base) == "hidden_size 32 (base 64)"


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"id2label": {"1": "b", "0": "a"}, "label2id": {"a": 0, "b": 1}}, ("a", "b")),
        ({}, ("LABEL_0", "LABEL_1")),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
    ],
)
def test_label_names(config: dict[str, object], names: tuple[str, ...]) -> None:
    assert label_names(json.loads(json.dumps(config)), "config.json") == names


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": {"1": "a", "2": "b"}},
        {"id2label": {"0": "a", "1": "a"}},
        {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}},
        {"id2label": ["a", "b"]},
        {"id2label": {"zero": "a"}},
    ],
)
def test_contradicting_labels_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError) as error:
        label_names(config, "models/x/config.json")
    assert error.value.where == "models/x/config.json"
