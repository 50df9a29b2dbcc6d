"""What two models must share before their tensors mean the same: architecture, vocabulary, and how text is cut."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from modelweld.errors import CheckpointError

__all__ = ["Tokenizing", "config_differences", "label_names", "tokenizing"]

# What changes the function that the weights compute; names, labels, dropout and versions do not.
DECISIVE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "activation",
    "activation_function",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "norm_eps",
    "max_position_embeddings",
    "type_vocab_size",
    "position_embedding_type",
    "relative_attention_num_buckets",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "partial_rotary_factor",
    "embedding_size",
    "num_experts",
    "num_local_experts",
    "n_embd",
    "n_layer",
    "n_head",
    "d_model",
    "d_ff",
    "num_layers",
    "num_heads",
    "dim",
    "n_layers",
    "n_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_sizes",
    "depths",
    "layer_type",
)

# Case, accents, numbers, punctuation, white space, scripts, and a word that no vocabulary holds: two tokenizers that
# cut these alike cut ordinary text alike.
PROBES = (
    "The quick brown Fox jumps over the lazy dog.",
    "ÉCOLE naïve Straße Ελλάδα ﬁle İstanbul",
    "3.14 1,000,000 2026-11-22 50% $9.99 C++ e-mail@example.org https://example.org/a?b=c#d",
    "  white\tspace\n\nruns \u00a0 together  ",
    "don't re-enter «quotes» “curly” … — (brackets) [MASK] <s> </s>",
    "中文字符 日本語テスト 한국어 العربية 🙂👍🏽",
    "antidisestablishmentarianismqzxjkw",
    "def f(x):\n    return x**2  # code",
)


@dataclass(frozen=True)
class Tokenizing:
    """How a model's tokenizer behaves: digests of its vocabulary and of its ids for fixed probes.

    `vocabulary` is None when there is no tokenizer, `cuts` when only a vocabulary file tells of it.
    """

    vocabulary: str | None = None
    cuts: str | None = None
    highest_token: int | None = None


def tokenizing(directory: Path) -> Tokenizing:
    """The fingerprint of the tokenizer in a model directory; CheckpointError when its file cannot be read.

    By behaviour, not by bytes: saving a tokenizer again reorders its file and sets truncation without changing what
    the model is fed.
    """
    whole, words = directory / "tokenizer.json", directory / "vocab.txt"
    if whole.is_file():
        return _of_tokenizer(whole)
    if words.is_file():
        try:
            lines = words.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"not a readable vocabulary: {error}", where=str(words)) from error
        return _of_vocabulary({token: number for number, token in enumerate(lines)}, None)
    return Tokenizing()


def _of_tokenizer(file: Path) -> Tokenizing:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise CheckpointError(f"not a readable tokenizer: {error}", where=str(file), hint="fetch it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    cuts = json.dumps([encoding.ids for encoding in tokenizer.encode_batch(list(PROBES))])
    return _of_vocabulary(tokenizer.get_vocab(with_added_tokens=True), cuts)


def _of_vocabulary(vocabulary: Mapping[str, int], cuts: str | None) -> Tokenizing:
    ordered = json.dumps(sorted((number, token) for token, number in vocabulary.items()))
    return Tokenizing(
        vocabulary=_digest(ordered),
        cuts=None if cuts is None else _digest(cuts),
        highest_token=max(vocabulary.values(), default=None),
    )


def _digest(text: str) -> str:
    return str(blake3(text.encode("utf-8", "surrogatepass")).hexdigest()[:16])


def config_differences(config: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """What of `config` computes something else than `base`: `hidden_size 32 (base 64), …`, empty when nothing does.

    A key that one of them leaves out is at its default there, and cannot be compared.
    """
    shared = [key for key in DECISIVE if key in config and key in base and config[key] != base[key]]
    return ", ".join(f"{key} {config[key]} (base {base[key]})" for key in shared)


def label_names(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The classes of a head in the order of their numbers; CheckpointError when config.json contradicts itself.

    transformers leaves its default of two unnamed classes out of the file.
    """
    try:
        table = {int(number): str(name) for number, name in (config.get("id2label") or _unnamed(config)).items()}
        inverse = {str(name): int(number) for name, number in (config.get("label2id") or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"id2label or label2id is no table of labels: {error}", where=where) from error
    names = tuple(table[number] for number in sorted(table))
    ordered = sorted(table) == list(range(len(table)))
    if not ordered or len(set(names)) < len(names) or (inverse and inverse != {n: i for i, n in enumerate(names)}):
        raise CheckpointError(
            "id2label and label2id contradict each other, or do not count from 0",
            where=where,
            hint="fix both in its config.json",
        )
    return names


def _unnamed(config: Mapping[str, Any]) -> dict[int, str]:
    count = config.get("num_labels")
    return {number: f"LABEL_{number}" for number in range(count if isinstance(count, int) else 2)}
