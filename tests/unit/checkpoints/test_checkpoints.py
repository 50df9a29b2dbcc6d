"""Checkpoints: what is read equals what other libraries wrote, and what we write other libraries read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modelweld.checkpoints import Checkpoint, content_digest, tensor_digest
from modelweld.checkpoints.names import match_names, tied_weights
from modelweld.checkpoints.pickles import rewrite_pickles
from modelweld.checkpoints.shards import ShardFile, lay_out, write_tensors
from modelweld.errors import CheckpointError
from tests.support.families import TINY, family, save

MIXED = {
    "a.weight": torch.randn(5, 7),
    "b.half": torch.randn(3, 4).to(torch.bfloat16),
    "c.ids": torch.arange(6).reshape(1, 6),
    "d.flag": torch.tensor([True, False, True]),
    "e.scalar": torch.tensor(2.5, dtype=torch.float64),
    "f.empty": torch.empty(0, 3),
}


def test_what_safetensors_wrote_is_read_bit_for_bit(tmp_path: Path) -> None:
    with Checkpoint.open(save(tmp_path, MIXED)) as checkpoint:
        assert checkpoint.tensors.keys() == MIXED.keys()
        for name, tensor in MIXED.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 40])
def test_what_we_write_safetensors_reads(tmp_path: Path, shard_bytes: int) -> None:
    layout = lay_out([(name, t.dtype, tuple(t.shape)) for name, t in MIXED.items()], shard_bytes)
    for shard in layout.shards:
        out = ShardFile(shard, tmp_path)
        for slot in reversed(shard.slots):
            raw = MIXED[slot.name].reshape(-1).view(torch.uint8).numpy().tobytes()
            for start in range(0, len(raw), 7):
                out.write(slot, start, memoryview(raw[start : start + 7]))
        out.close()
    index = layout.index()
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_bytes(index)
    theirs: dict[str, torch.Tensor] = {}
    for shard in layout.shards:
        theirs |= load_file(tmp_path / shard.file)
        with safe_open(tmp_path / shard.file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert theirs.keys() == MIXED.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in MIXED.items())
    with Checkpoint.open(tmp_path) as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in MIXED.items())


def test_small_files_are_written_at_once(tmp_path: Path) -> None:
    write_tensors(tmp_path / "head.safetensors", MIXED, {"who": "me"})
    assert all(torch.equal(t, MIXED[name]) for name, t in load_file(tmp_path / "head.safetensors").items())
    with safe_open(tmp_path / "head.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "who": "me"}


def test_a_shard_per_tensor_has_the_same_tensor_digests(tmp_path: Path) -> None:
    save(tmp_path / "one", {"x": MIXED["a.weight"], "y": MIXED["b.half"]})
    many = tmp_path / "many"
    many.mkdir()
    weight_map = {}
    for number, name in enumerate(("x", "y"), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: MIXED["a.weight"] if name == "x" else MIXED["b.half"]}, many / file)
        weight_map[name] = file
    (many / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with Checkpoint.open(tmp_path / "one") as one, Checkpoint.open(many) as two:
        assert {n: tensor_digest(one, n) for n in "xy"} == {n: tensor_digest(two, n) for n in "xy"}


def test_content_digest_sees_weights_and_config_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(3)}, {"hidden": 1})
    before = content_digest(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert content_digest(tmp_path) == before
    (tmp_path / "config.json").write_text(json.dumps({"hidden": 2}))
    changed = content_digest(tmp_path)
    assert changed != before
    save(tmp_path, {"x": torch.zeros(3)})
    assert content_digest(tmp_path) != changed


def test_pickles_are_refused_then_read_on_request_and_rewritten(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save({"a": weight, "tied": weight, "b": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can run code"):
        Checkpoint.open(tmp_path)
    with Checkpoint.open(tmp_path, allow_pickle=True) as checkpoint:
        assert torch.equal(checkpoint.read("a"), weight)
    rewrite_pickles([tmp_path / "pytorch_model.bin"], tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == {"a", "b"}


def test_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        Checkpoint.open(tmp_path)


def test_two_answers_to_which_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(1)})
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    index = {"weight_map": {"x": "other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="holds both"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "kind", ["bert", "bert-mlm", "roberta", "distilbert", "deberta-v2", "vit", "t5", "llama", "gpt2"]
)
def test_names_align_as_transformers_prefix_does(tmp_path: Path, kind: str) -> None:
    base, expert, prefix, alone = family(kind)
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    assert type(expert).base_model_prefix + "." == prefix
    with Checkpoint.open(tmp_path / "base") as reference, Checkpoint.open(tmp_path / "expert") as model:
        alignment = match_names(reference, model, "expert")
        stored = set(model.tensors)
    backbone = {name for name in stored if name.startswith(prefix)}
    assert alignment.prefix == prefix
    assert set(alignment.names.values()) | set(alignment.head) == stored - set(alignment.ignored)
    assert all(expected in backbone for expected in alignment.names.values())
    if kind != "bert-mlm":
        assert not {name for name in alignment.head if name.startswith(prefix)}
        assert all(prefix + name == expert_name for name, expert_name in alignment.names.items())
    else:
        # The masked-language model has no pooler: each task keeps its own.
        assert {name for name in alignment.head if name.startswith(prefix)} == {
            "bert.pooler.dense.bias",
            "bert.pooler.dense.weight",
        }
    assert (alone in alignment.absent) if alone else all("head" in why for why in alignment.absent.values())


def test_language_models_of_one_class_align_whole(tmp_path: Path) -> None:
    import transformers as t

    config = t.LlamaConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=False)
    t.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    t.LlamaForCausalLM(config).save_pretrained(tmp_path / "expert")
    with Checkpoint.open(tmp_path / "base") as reference, Checkpoint.open(tmp_path / "expert") as model:
        alignment = match_names(reference, model, "expert")
        assert alignment.names == {name: name for name in reference.tensors}
        assert "lm_head.weight" in alignment.names
        assert alignment.head == ()


def test_a_stored_copy_of_the_embedding_is_known_as_tied(tmp_path: Path) -> None:
    table = torch.randn(8, 4)
    tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(), "model.x.weight": torch.ones(8, 4)}
    save(tmp_path, tensors, {"tie_word_embeddings": True, "vocab_size": 8})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert tied_weights(checkpoint) == {"lm_head.weight": "model.embed_tokens.weight"}
    save(tmp_path, tensors, {"tie_word_embeddings": False, "vocab_size": 8})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert tied_weights(checkpoint) == {}


def test_vocabulary_and_shape_mismatches_name_both_sides(tmp_path: Path) -> None:
    save(tmp_path / "base", {"embed.weight": torch.ones(8, 4), "fc.weight": torch.ones(4, 4)}, {"vocab_size": 8})
    save(tmp_path / "more", {"embed.weight": torch.ones(9, 4), "fc.weight": torch.ones(4, 4)}, {"vocab_size": 9})
    save(tmp_path / "wide", {"embed.weight": torch.ones(8, 4), "fc.weight": torch.ones(4, 5)}, {"vocab_size": 8})
    save(tmp_path / "less", {"embed.weight": torch.ones(8, 4)}, {"vocab_size": 8})
    with Checkpoint.open(tmp_path / "base") as base:
        for name, words in {
            "more": "vocabulary of 9, the base one of 8",
            "wide": r"\[4, 5\], the base \[4, 4\]",
            "less": "lacks tensor 'fc.weight'",
        }.items():
            with Checkpoint.open(tmp_path / name) as model, pytest.raises(CheckpointError, match=words):
                match_names(base, model, name)
        words = "which is not present in the base"
        with Checkpoint.open(tmp_path / "less") as less, pytest.raises(CheckpointError, match=words):
            match_names(less, base, "base")
