"""Predictions are transformers' own, whatever the batches; kept ones are believed only when they are whole."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelweld.checkpoints.loading import load_tokenizer
from modelweld.errors import CheckpointError, ConfigError, InputError
from modelweld.evaluation.batching import token_batches
from modelweld.evaluation.cache import PredictionCache, Predictions
from modelweld.evaluation.kinds import kind_of
from modelweld.evaluation.labels import LabelSpace
from modelweld.evaluation.predictions import write_predictions
from modelweld.evaluation.settings import Settings, choose_device
from modelweld.evaluation.systems import System, model_digest, open_system, prediction_key
from modelweld.evaluation.texts import encode, predict, tokenizer_digest
from tests.conftest import Family

TASK = "animal"


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = token_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    order = [lengths[row] for batch in batches for row in batch]
    assert order == sorted(order, reverse=True)


def texts_of(family: Family) -> list[str]:
    return list(pd.read_parquet(family.dataset(TASK) / "test.parquet")["text"])


def settings(batch_tokens: int = 200, max_length: int = 16) -> Settings:
    return Settings(max_length=max_length, batch_tokens=batch_tokens, device="cpu")


def predicted(family: Family, system: System, how: Settings, heard: list[int] | None = None) -> Predictions:
    tokenizer = load_tokenizer(system.backbone)
    encoded = encode(tokenizer, texts_of(family), how.max_length)
    return predict(open_system(system), tokenizer, encoded, how, (heard or []).append, system.name)


def reference(model: Any, family: Family) -> torch.Tensor:
    tokenizer = load_tokenizer(family.base)
    with torch.inference_mode():
        one_by_one = [model.eval()(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts_of(family)]
    return torch.stack(one_by_one).softmax(-1)


def test_predictions_are_those_of_one_text_at_a_time(tiny_bert_family: Family) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tiny_bert_family.expert(TASK)
    expected = reference(AutoModelForSequenceClassification.from_pretrained(folder), tiny_bert_family)
    found = predicted(tiny_bert_family, System("expert", folder), settings())
    assert found.classes.tolist() == expected.argmax(-1).tolist()
    np.testing.assert_allclose(found.confidence, expected.amax(-1), atol=1e-3)


@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_batches_do_not_change_the_classes(tiny_bert_family: Family, budget: int) -> None:
    system = System("expert", tiny_bert_family.expert(TASK))
    one, other = (predicted(tiny_bert_family, system, settings(tokens)) for tokens in (budget, 200))
    np.testing.assert_array_equal(one.classes, other.classes)
    np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-3)


def test_bfloat16_is_coarser_but_near(tiny_bert_family: Family) -> None:
    folder = tiny_bert_family.expert(TASK)
    tokenizer, model = load_tokenizer(folder), open_system(System("expert", folder))
    torch.manual_seed(0)
    # The fitted head of so small a model is ill-conditioned: it would show the noise of any precision.
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    torch.nn.init.zeros_(model.classifier.bias)
    encoded = encode(tokenizer, texts_of(tiny_bert_family), 16)
    exact, coarse = (
        predict(model, tokenizer, encoded, Settings(16, 200, "cpu", precision), lambda _: None, "expert").confidence
        for precision in ("float32", "bfloat16")
    )
    assert not np.array_equal(exact, coarse)
    np.testing.assert_allclose(exact, coarse, atol=0.02)


def test_progress_hears_every_row(tiny_bert_family: Family) -> None:
    heard = [0]
    predicted(tiny_bert_family, System("expert", tiny_bert_family.expert(TASK)), settings(), heard)
    assert sum(heard) == len(texts_of(tiny_bert_family))
    assert len(heard) > 2


def test_the_base_gets_the_head_of_the_expert(tiny_bert_family: Family) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    expert = tiny_bert_family.expert(TASK)
    composed = open_system(System("base", tiny_bert_family.base, head_from=expert)).state_dict()
    head = AutoModelForSequenceClassification.from_pretrained(expert).state_dict()
    base = AutoModel.from_pretrained(tiny_bert_family.base).state_dict()
    assert composed.keys() == head.keys()
    for name, tensor in composed.items():
        torch.testing.assert_close(
            tensor, base[name.removeprefix("bert.")] if name.startswith("bert.") else head[name], rtol=0, atol=0
        )


def test_a_base_of_another_shape_is_refused(tiny_bert_family: Family, fresh_family: Callable[..., Family]) -> None:
    other = fresh_family(hidden=64)
    with pytest.raises(CheckpointError):
        open_system(System("base", other.base, head_from=tiny_bert_family.expert(TASK)))


def test_a_model_without_a_classifier_is_refused(tiny_bert_family: Family) -> None:
    with pytest.raises(CheckpointError, match="BertModel classifies no texts"):
        open_system(System("expert", tiny_bert_family.base))


def test_weights_that_give_nan_are_refused(fresh_family: Callable[..., Family]) -> None:
    from safetensors.torch import load_file, save_file

    family = fresh_family()
    file = family.expert(TASK) / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="expert: the model's outputs are not finite"):
        predicted(family, System("expert", family.expert(TASK)), settings())


def test_rows_longer_than_the_position_table_are_refused(tiny_bert_family: Family) -> None:
    folder = tiny_bert_family.expert(TASK)
    tokenizer = load_tokenizer(folder)
    model = open_system(System("expert", folder))
    room = model.config.max_position_embeddings
    for words, fits in ((room - 2, True), (room - 1, False)):
        encoded = encode(tokenizer, ["the " * words], max_length=10_000)
        if fits:
            assert len(predict(model, tokenizer, encoded, settings(), lambda _: None, "expert")) == 1
        else:
            with pytest.raises(ConfigError, match=f"a row has {room + 1} tokens, the model has {room} positions"):
                predict(model, tokenizer, encoded, settings(), lambda _: None, "expert")


def test_positions_of_roberta_start_behind_the_padding() -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=12,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    model(input_ids=torch.full((1, 10), 5))
    from modelweld.evaluation.texts import _check_positions

    _check_positions(model, 10, "expert")
    with pytest.raises(ConfigError, match="11 tokens, the model has 10 positions"):
        _check_positions(model, 11, "expert")


def test_a_tokenizer_without_padding_is_refused(fresh_family: Callable[..., Family]) -> None:
    tokenizer = load_tokenizer(fresh_family().base)
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="no padding token"):
        encode(tokenizer, ["a"], 8)


def test_devices_that_are_not_there_are_refused() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "cpu:1", "cuda:x", ""):
        with pytest.raises(ConfigError, match="MODELWELD_DEVICE: no device is called"):
            choose_device(wrong)
    with pytest.raises(ConfigError, match=r"no cuda:99 on this machine"):
        choose_device("cuda:99")


def test_the_key_sees_everything_that_decides_a_prediction(tiny_bert_family: Family) -> None:
    system, space = System("merged", tiny_bert_family.expert(TASK), task=TASK), LabelSpace(("a", "b"))
    keys = {
        prediction_key(system, "model", "tokenizer", "data", space, settings()),
        prediction_key(system, "other", "tokenizer", "data", space, settings()),
        prediction_key(system, "model", "other", "data", space, settings()),
        prediction_key(system, "model", "tokenizer", "other", space, settings()),
        prediction_key(system, "model", "tokenizer", "data", LabelSpace(("b", "a")), settings()),
        prediction_key(system, "model", "tokenizer", "data", space, settings(batch_tokens=201)),
        prediction_key(system, "model", "tokenizer", "data", space, settings(max_length=17)),
        prediction_key(system, "model", "tokenizer", "data", space, Settings(16, 200, "cpu", "bfloat16")),
        prediction_key(System("merged", system.backbone, task="x"), "model", "tokenizer", "data", space, settings()),
    }
    assert len(keys) == 9


def test_digests_see_weights_heads_and_tokenizers(fresh_family: Callable[..., Family]) -> None:
    family = fresh_family()
    expert, base = family.expert(TASK), family.base
    bare, lent = model_digest(System("a", base)), model_digest(System("a", base, head_from=expert))
    assert len({bare, lent, model_digest(System("a", base, head_from=family.expert("colour")))}) == 3
    copy = family.root / "copy"
    shutil.copytree(expert, copy)
    assert model_digest(System("b", copy)) == model_digest(System("a", expert))
    assert tokenizer_digest(copy) == tokenizer_digest(expert)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_digest(System("b", copy)) != model_digest(System("a", expert))
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    assert tokenizer_digest(copy) != tokenizer_digest(expert)


def entry(rows: int = 50) -> Predictions:
    generator = np.random.default_rng(0)
    return Predictions(generator.integers(0, 5, rows), generator.random(rows, dtype=np.float32))


KEY, OTHER = "a" * 64, "b" * 64


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    cache = PredictionCache(tmp_path / "cache")
    assert cache.get(KEY, 50) is None
    cache.put(KEY, entry())
    found = cache.get(KEY, 50)
    assert found is not None
    np.testing.assert_array_equal(found.classes, entry().classes)
    np.testing.assert_array_equal(found.confidence, entry().confidence)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{KEY}.parquet"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    classes = table["class"].to_numpy().copy()
    classes[3] += 1
    pq.write_table(table.set_column(0, "class", pa.array(classes)), path)


def _rename_column(path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(path).rename_columns(["classes", "confidence"]), path)


def _unseal(path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)


@pytest.mark.parametrize("spoil", [_truncate, _empty, _flip, _rename_column, _unseal])
def test_a_spoilt_entry_is_not_believed(
    tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    cache = PredictionCache(tmp_path)
    cache.put(KEY, entry())
    spoil(tmp_path / f"{KEY}.parquet")
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY, 50) is None
    assert "made again" in caplog.text


def test_an_entry_belongs_to_its_key_and_its_rows(tmp_path: Path) -> None:
    cache = PredictionCache(tmp_path)
    cache.put(KEY, entry())
    assert cache.get(KEY, 49) is None
    shutil.copy(tmp_path / f"{KEY}.parquet", tmp_path / f"{OTHER}.parquet")
    assert cache.get(OTHER, 50) is None


def test_a_cache_that_cannot_be_written_loses_no_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = PredictionCache(tmp_path / "file")
    cache.put(KEY, entry())
    assert "not cached" in caplog.text
    assert cache.get(KEY, 50) is None


def test_equal_predictions_are_equal_bytes_and_never_written_in_place(tmp_path: Path) -> None:
    space, truth = LabelSpace(("a", "b", "c", "d", "e")), entry().classes
    path, linked = tmp_path / "t.parquet", tmp_path / "linked.parquet"
    columns = kind_of("text-classification").prediction_columns
    write_predictions(path, columns(truth, {"base": entry(), "ties": entry(), "merged": entry()}, space))
    first = path.read_bytes()
    linked.hardlink_to(path)
    write_predictions(path, columns(truth, {"base": entry(), "ties": entry(), "merged": entry()}, space))
    assert path.read_bytes() == first
    assert not path.samefile(linked)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["linked.parquet", "t.parquet"]
    frame = pd.read_parquet(path)
    named = ["row", "label", "base", "base.confidence", "ties", "ties.confidence", "merged", "merged.confidence"]
    assert list(frame.columns) == named
    assert list(frame["merged"]) == [space.names[number] for number in truth]
