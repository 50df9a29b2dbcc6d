"""Texts through a model: its tokenizer, token ids cut to a length, and predictions in batches of like length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from modelweld.errors import CheckpointError, ConfigError, ExternalError, InputError
from modelweld.evaluation.batching import token_batches
from modelweld.evaluation.cache import CONFIDENCE_DIGITS, Predictions
from modelweld.evaluation.settings import Settings

CPU_TOKENS = 4096  # on a CPU larger batches fall out of its caches: measured 1.5 times the time at 16,384

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


def tokenizer_digest(folder: Path) -> str:
    """BLAKE3 over the tokenizer's files: two models with equal digests share their encoded texts."""
    hasher = blake3()
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            raw = path.read_bytes()
            hasher.update(f"{name}:{len(raw)}:".encode())
            hasher.update(raw)
    return str(hasher.hexdigest())


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, list[list[int]]]:
    """Token ids and masks by text, cut to `max_length`, not padded."""
    if tokenizer.pad_token_id is None:
        raise InputError(
            "its tokenizer has no padding token, and texts are predicted in batches",
            where=str(tokenizer.name_or_path),
            hint="set pad_token in tokenizer_config.json and pad_token_id in config.json of the model",
        )
    return dict(tokenizer(list(texts), truncation=True, max_length=max_length, padding=False))


def predict(
    model: Any,
    tokenizer: Any,
    encoded: dict[str, list[list[int]]],
    settings: Settings,
    advance: Callable[[int], None],
    where: str,
) -> Predictions:
    """The class of every row and its probability, in the rows' order.

    Weights are float32, whatever they are stored in; `precision` is that of the matrix products. `advance` hears the
    number of rows of each batch. CheckpointError when the model gives NaN, ConfigError when a row is longer than it can
    take; ExternalError when the device runs out of memory.
    """
    from transformers import DataCollatorWithPadding

    lengths = [len(ids) for ids in encoded["input_ids"]]
    _check_positions(model, max(lengths), where)
    taken = inspect.signature(model.forward).parameters
    columns = {name: values for name, values in encoded.items() if name in taken}
    collate = DataCollatorWithPadding(tokenizer)
    model = model.to(device=settings.device, dtype=torch.float32).eval()

    kind = settings.device.partition(":")[0]
    budget = min(settings.batch_tokens, CPU_TOKENS) if kind == "cpu" else settings.batch_tokens
    order: list[int] = []
    collected = []
    with torch.inference_mode(), settings.products():
        for rows in token_batches(lengths, budget):
            batch = collate([{name: values[row] for name, values in columns.items()} for row in rows])
            try:
                logits = model(**batch.to(settings.device)).logits  # (rows, classes)
            except torch.OutOfMemoryError as error:
                raise ExternalError(
                    f"out of memory on {settings.device} with {len(rows)} rows of {lengths[rows[0]]} tokens",
                    where=where,
                    hint="lower evaluate.batch_tokens in params.yaml",
                ) from error
            # Kept on the device: fetching each batch's logits would make every batch wait for the last one.
            collected.append(logits)
            order.extend(rows)
            advance(len(rows))
        every = torch.cat(collected).float().cpu()
    if not bool(torch.isfinite(every).all()):
        raise CheckpointError(
            "the model's outputs are not finite", where=where, hint="check its weights: `modelweld stage validate`"
        )
    probabilities, classes = every.softmax(dim=-1).max(dim=-1)
    back = np.argsort(np.array(order), kind="stable")
    confidence = np.round(probabilities.double().numpy(), CONFIDENCE_DIGITS).astype(np.float32)
    return Predictions(classes.numpy()[back], confidence[back])


def _check_positions(model: Any, longest: int, where: str) -> None:
    """Refuse rows that are longer than a learned position table: the lookup would die inside torch with an index."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe") and isinstance(module, torch.nn.Embedding):
            # RoBERTa counts positions from after its padding index.
            room = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if longest > room:
                raise ConfigError(
                    f"a row has {longest} tokens, the model has {room} positions",
                    where=where,
                    hint=f"set max_length of the task to {room} or less",
                )
