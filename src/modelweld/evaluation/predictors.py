"""Systems to evaluate (a backbone with one task's head), opened and run over texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from blake3 import blake3

from modelweld.checkpoints.adapter import is_adapter
from modelweld.checkpoints.checkpoint import Checkpoint
from modelweld.checkpoints.digests import content_digest
from modelweld.checkpoints.loading import load, load_under_head
from modelweld.checkpoints.names import is_buffer, match_names
from modelweld.errors import CheckpointError, ConfigError, ExternalError, InputError
from modelweld.evaluation.batching import token_batches
from modelweld.evaluation.cache import Predictions, content_key
from modelweld.evaluation.labels import LabelSpace
from modelweld.hardware import Precision

PREDICTION_VERSION = 1  # raise it when the same inputs may give other predictions
CONFIDENCE_DIGITS = 4  # float32 noise between batch shapes stays below
CPU_TOKENS = 4096  # on a CPU larger batches fall out of its caches: measured 1.5 times the time at 16,384

Kind = Literal["text-classification", "image-classification"]
KINDS: dict[Kind, tuple[str, str]] = {
    "text-classification": ("ForSequenceClassification", "texts"),
    "image-classification": ("ForImageClassification", "images"),
}
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


@dataclass(frozen=True)
class System:
    """What is scored under one name: `backbone` with its own head of `task`, or with the head of another model.

    `head` lends a head where the backbone, a whole model, has none: the base with the expert's head is what the base
    knows without any finetuning. `base` is what adapters are folded into.
    """

    name: str
    backbone: Path
    task: str | None = None
    head: Path | None = None
    base: Path | None = None

    @property
    def side_files(self) -> Path:
        """Where its tokenizer and the like are: an adapter may have been saved without any, and uses its base's."""
        if self.base is None or not is_adapter(self.backbone):
            return self.backbone
        return self.backbone if any((self.backbone / name).is_file() for name in TOKENIZER_FILES) else self.base


@dataclass(frozen=True)
class Settings:
    """How texts become predictions; all of it is part of the cache's key."""

    max_length: int
    batch_tokens: int
    device: str
    precision: Precision = "float32"

    def products(self) -> torch.autocast:
        """A context in which matrix products are computed in `precision`."""
        kind, half = self.device.partition(":")[0], self.precision != "float32"
        return torch.autocast(kind, getattr(torch, self.precision) if half else None, enabled=half)

    def document(self) -> dict[str, Any]:
        """What a prediction depends on beside model, tokenizer and rows."""
        return {
            "max_length": self.max_length,
            "batch_tokens": self.batch_tokens,
            "precision": self.precision,
            "device": self.device.partition(":")[0],
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "packages": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
            "code": PREDICTION_VERSION,
        }


def choose_device(wanted: str) -> str:
    """A torch device name for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`; ConfigError when it is not to be had."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise ConfigError(
            f"no device is called {wanted!r}", where="MODELWELD_DEVICE", hint="auto, cpu, cuda, cuda:<i> or mps"
        )
    count = torch.cuda.device_count() if kind == "cuda" else int(kind == "cpu" or torch.backends.mps.is_available())
    if int(index or 0) >= count:
        raise ConfigError(f"no {wanted} on this machine", where="MODELWELD_DEVICE", hint="auto takes what is there")
    return wanted


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


def prediction_key(system: System, model: str, tokenizer: str, dataset: str, space: LabelSpace, how: Settings) -> str:
    """The cache key of a system's predictions on one set."""
    return content_key(
        {
            "model": model,
            "task": system.task,
            "tokenizer": tokenizer,
            "dataset": dataset,
            "classes": list(space.names),
            "settings": how.document(),
        }
    )


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


def open_system(system: System, kind: Kind = "text-classification") -> Any:
    """The system's transformers model on the CPU; CheckpointError when a head or a part of the backbone is missing."""
    lends = system.head or system.backbone
    lent = system.head is not None and is_adapter(system.head)
    model = load_under_head(lends, system.backbone) if lent else load(lends, task=system.task, base=system.base)
    ending, what = KINDS[kind]
    if not type(model).__name__.endswith(ending):
        raise CheckpointError(
            f"{type(model).__name__} classifies no {what}",
            where=str(lends),
            hint=f"an expert is saved as a …{ending}, which its config.json names",
        )
    if system.head is None or lent:
        return model
    state = model.state_dict()
    with Checkpoint.open(system.backbone) as backbone, Checkpoint.open(system.head) as lender:
        alignment = match_names(backbone, lender, str(system.head))
        if any(stored not in state and not is_buffer(stored) for stored in alignment.names.values()):
            return _converted(model, lender, {stored: backbone.read(name) for name, stored in alignment.names.items()})
        with torch.no_grad():
            for name, stored in alignment.names.items():
                if stored in state:
                    state[stored].copy_(backbone.read(name))
    return model


def _converted(model: Any, lender: Checkpoint, backbone: Mapping[str, torch.Tensor]) -> Any:
    """The model with a backbone whose tensors have other names on disk than in memory, as transformers renames them."""
    state = {name: lender.read(name) for name in lender.tensors} | dict(backbone)
    loaded, report = type(model).from_pretrained(
        None, config=model.config, state_dict=state, output_loading_info=True, dtype=torch.float32
    )
    strangers = sorted(name for name in {*report["unexpected_keys"], *report["missing_keys"]} if not is_buffer(name))
    if strangers:
        stored = next((name for name in backbone if name in strangers), strangers[0])
        raise CheckpointError(
            f"tensor {stored!r} of the file has no place in {type(model).__name__}",
            where=lender.place(stored) if stored in lender.tensors else str(lender.path),
            hint="load the model with this version of transformers and save it again",
        )
    return loaded.eval()


def model_digest(system: System) -> str:
    """One digest for the weights and configs that make this system, a lent head and an adapter's base included."""
    parts = {"backbone": content_digest(system.backbone)}
    if system.head is not None:
        parts["head"] = content_digest(system.head)
    if system.base is not None and any(is_adapter(path) for path in (system.backbone, system.head) if path is not None):
        parts["base"] = content_digest(system.base)
    return parts["backbone"] if len(parts) == 1 else content_key(parts)
