"""The base model, and one expert per task finetuned from it, on one thread each.

The embeddings and the lowest layers may be frozen. What they compute then never changes, so it is computed once per row
and every step begins above them. An expert starts from a linear probe: a logistic regression on the frozen base's
pooled output becomes the classification head. It is refused unless it beats, on the validation split, the best probe
that the frozen base allows (on averaged token vectors, as the base was trained to be used): otherwise there would be
nothing in its weights worth merging.

Run it by: python examples/minilm/prepare.py
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from problems import WeakExpert
from recipe import LAYERS, Expert, Training
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
SPLITS = ("train", "validation")
TIMED_STEPS = 2


@dataclass
class Split:
    """Token ids and label ids of one split; `frozen`: what the frozen layers make of each row, (length, d)."""

    ids: list[list[int]]
    labels: np.ndarray
    frozen: list[torch.Tensor] | None = None


def save_base(package: Path, out: Path) -> None:
    """The package's model as a Hugging Face directory with the tensors its experts have, pooler included."""
    model = AutoModel.from_pretrained(package, dtype=torch.float32)
    _save(model, package, out)


def _save(model: Any, tokenizer_of: Path, out: Path) -> None:
    # Beside its place first, so that no reader sees half a model.
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    for name in TOKENIZER_FILES:
        # Byte for byte, so that base and experts are seen to share one tokenizer.
        if (tokenizer_of / name).is_file():
            shutil.copyfile(tokenizer_of / name, staging / name)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(staging, out)


def read_splits(folder: Path, tokenizer: Any, max_length: int) -> tuple[list[str], dict[str, Split]]:
    """The label names, sorted, and the splits that finetuning sees as token ids."""
    frames = {name: pd.read_parquet(folder / f"{name}.parquet") for name in SPLITS}
    names = sorted(frames["train"]["label"].unique())
    number = {name: index for index, name in enumerate(names)}
    splits = {
        name: Split(
            ids=tokenizer(list(frame["text"]), truncation=True, max_length=max_length, padding=False)["input_ids"],
            labels=frame["label"].map(number).to_numpy(),
        )
        for name, frame in frames.items()
    }
    return names, splits


def batches(ids: list[list[int]], size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, shortest first."""
    order = sorted(range(len(ids)), key=lambda row: (len(ids[row]), row))
    return [order[start : start + size] for start in range(0, len(order), size)]


def schedule(ids: list[list[int]], size: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches, reshuffled every epoch; a batch takes rows of similar length from eight batches' worth."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[list[int]] = []
    pool = size * 8
    while len(chosen) < steps:
        rows = torch.randperm(len(ids), generator=generator).tolist()
        epoch = []
        for start in range(0, len(rows), pool):
            part = sorted(rows[start : start + pool], key=lambda row: len(ids[row]))
            epoch += [part[at : at + size] for at in range(0, len(part), size)]
        chosen += [epoch[index] for index in torch.randperm(len(epoch), generator=generator).tolist()]
    return chosen[:steps]


# The model in two parts: frozen layers, and what is trained above them


@contextmanager
def _only(encoder: Any, layers: Any) -> Iterator[None]:
    every = encoder.layer
    encoder.layer = layers
    try:
        yield
    finally:
        encoder.layer = every


def _encode(bert: Any, layers: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What `layers` make of `hidden` (B, L, d); `mask` (B, L) is true where there is a token."""
    with _only(bert.encoder, layers):
        # None where nothing is padding: attention without a mask is faster.
        attended = None if bool(mask.all()) else mask[:, None, None, :]
        return bert.encoder(hidden, attention_mask=attended).last_hidden_state


def _enter(bert: Any, split: Split, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of the trained layers (B, L, d) for these rows, and their mask (B, L)."""
    if split.frozen is None:
        ids = pad_sequence([torch.tensor(split.ids[row]) for row in rows], batch_first=True)
        hidden = bert.embeddings(input_ids=ids)
    else:
        hidden = pad_sequence([split.frozen[row] for row in rows], batch_first=True)
    lengths = torch.tensor([len(split.ids[row]) for row in rows])
    return hidden, torch.arange(hidden.shape[1]) < lengths[:, None]


def freeze(bert: Any, splits: dict[str, Split], layers: int, advance: Callable[[int], None]) -> None:
    """Compute the output of the lowest `layers` once for every row; `advance` is called with the work done."""
    if layers == 0:
        return
    for split in splits.values():
        found: list[Any] = [None] * len(split.ids)
        with torch.no_grad():
            for rows in batches(split.ids, 64):
                hidden, mask = _enter(bert, split, rows)
                hidden = _encode(bert, bert.encoder.layer[:layers], hidden, mask)
                for at, row in enumerate(rows):
                    found[row] = hidden[at, : len(split.ids[row])].clone()
                advance(hidden.shape[0] * hidden.shape[1] * layers)
        split.frozen = found


def features(bert: Any, split: Split, above: int, advance: Callable[[int], None]) -> dict[str, np.ndarray]:
    """What a probe may see of the frozen base: `pooled` (what a head gets) and `mean` (averaged token vectors)."""
    found: dict[str, list[Any]] = {"pooled": [None] * len(split.ids), "mean": [None] * len(split.ids)}
    layers = bert.encoder.layer[above:]
    with torch.inference_mode():
        for rows in batches(split.ids, 64):
            entered, mask = _enter(bert, split, rows)
            hidden = _encode(bert, layers, entered, mask)
            pooled = bert.pooler(hidden)  # (B, d)
            weights = mask.unsqueeze(-1).float()  # (B, L, 1)
            mean = (hidden * weights).sum(1) / weights.sum(1)  # (B, d)
            for at, row in enumerate(rows):
                found["pooled"][row] = pooled[at].numpy()
                found["mean"][row] = mean[at].numpy()
            advance(hidden.shape[0] * hidden.shape[1] * len(layers))
    return {name: np.stack(vectors) for name, vectors in found.items()}


def best_probe(
    train: tuple[np.ndarray, np.ndarray],
    held: tuple[np.ndarray, np.ndarray],
    c: list[float],
    *,
    standardised: bool = True,
) -> Pipeline:
    """The logistic regression whose strength of regularisation does best on the held-out features and labels."""
    fitted = []
    with threadpool_limits(1):
        for strength in c:
            scaler = StandardScaler(with_std=standardised)
            fitted.append(make_pipeline(scaler, LogisticRegression(C=strength, max_iter=200)).fit(*train))
        return max(fitted, key=lambda probe: probe.score(*held))


def set_head(head: torch.nn.Linear, probe: Pipeline) -> None:
    """Make the head predict what the probe predicts: the scaler is folded in, two classes get opposite logits."""
    scaler, regression = probe[0], probe[1]
    weight = regression.coef_ / (1.0 if scaler.scale_ is None else scaler.scale_)  # (labels or 1, d)
    bias = regression.intercept_ - weight @ scaler.mean_
    if weight.shape[0] == 1:
        weight, bias = np.vstack([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))


def logits(model: Any, split: Split, rows: list[int], above: int) -> torch.Tensor:
    """(B, labels) for these rows."""
    hidden = _encode(model.bert, model.bert.encoder.layer[above:], *_enter(model.bert, split, rows))
    return model.classifier(model.bert.pooler(hidden))


def accuracy(model: Any, split: Split, above: int, advance: Callable[[int], None]) -> float:
    """The share of rows whose class is predicted."""
    right = 0
    with torch.inference_mode():
        for rows in batches(split.ids, 64):
            right += int((logits(model, split, rows, above).argmax(-1).numpy() == split.labels[rows]).sum())
            advance(len(rows) * max(len(split.ids[row]) for row in rows) * len(model.bert.encoder.layer[above:]))
    return right / len(split.ids)


def finetune(model: Any, train: Split, expert: Expert, how: Training, advance: Callable[[int], None]) -> None:
    """Train what lies above the frozen layers, in place, by AdamW with warm-up and linear decay."""
    weights = _unfreeze(model, how.frozen_layers)
    head = list(model.classifier.parameters())
    body = [weight for weight in weights if not any(weight is own for own in head)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight for weight in body if weight.ndim > 1], "weight_decay": how.weight_decay},
            {"params": [weight for weight in body if weight.ndim <= 1], "weight_decay": 0.0},
            {"params": head, "weight_decay": 0.0, "lr": how.head.learning_rate or expert.learning_rate},
        ],
        lr=expert.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    steps, warm = expert.steps, max(1, round(how.warmup * expert.steps))
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    targets = torch.tensor(train.labels)
    trained = len(model.bert.encoder.layer[how.frozen_layers :])
    for rows in schedule(train.ids, how.batch_size, steps, how.seed):
        loss = torch.nn.functional.cross_entropy(logits(model, train, rows, how.frozen_layers), targets[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pace.step()
        # A step computes each product three times: forward, and the gradients of inputs and weights.
        advance(3 * len(rows) * max(len(train.ids[row]) for row in rows) * trained)


def _unfreeze(model: Any, frozen_layers: int) -> list[Any]:
    """The weights to train; all others get no gradient."""
    bert = model.bert
    model.requires_grad_(False)
    for part in [*bert.encoder.layer[frozen_layers:], bert.pooler, model.classifier]:
        part.requires_grad_(True)
    if frozen_layers == 0:
        bert.embeddings.requires_grad_(True)
        bert.embeddings.word_embeddings.requires_grad_(False)
    return [weight for weight in model.parameters() if weight.requires_grad]


# One expert, and one step's time


def make_expert(
    task: str, root: Path, expert: Expert, how: Training, advance: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """`root`/models/<task>/ and the facts about it; raises WeakExpert, keeping nothing, when the probe is not beaten.

    `advance` is called with the work done since its last call (see recipe.py).
    """
    clock = time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(how.seed)
    base, above = root / "models" / "base", how.frozen_layers
    tokenizer = AutoTokenizer.from_pretrained(base)
    names, splits = read_splits(root / "texts" / task, tokenizer, how.max_length)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        dtype=torch.float32,
        attn_implementation="sdpa",
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        # Drawing dropout masks takes a quarter of a step on a CPU and one epoch and a half hardly overfits.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).eval()
    train, validation = splits["train"], splits["validation"]
    freeze(model.bert, splits, above, advance)
    seen = {name: features(model.bert, split, above, advance) for name, split in splits.items()}
    views = {view: [(seen[name][view], split.labels) for name, split in splits.items()] for view in ("pooled", "mean")}
    probe = best_probe(*views["mean"], how.probe_strengths)
    set_head(model.classifier, best_probe(*views["pooled"], how.head.strengths, standardised=how.head.standardised))
    prepared = time.process_time()
    finetune(model, train, expert, how, advance)
    finished = time.process_time()
    result = {
        "task": task,
        "labels": len(names),
        "steps": expert.steps,
        "accuracy": {
            "expert": round(accuracy(model, validation, above, advance), 4),
            "probe": round(float(probe.score(*views["mean"][1])), 4),
        },
        "seconds_per_step": round((finished - prepared) / expert.steps, 4),
        "seconds": round(time.process_time() - clock, 1),
    }
    _refuse_weak(task, result["accuracy"])
    defaults = json.loads((base / "config.json").read_text(encoding="utf-8"))
    model.config.hidden_dropout_prob = defaults["hidden_dropout_prob"]
    model.config.attention_probs_dropout_prob = defaults["attention_probs_dropout_prob"]
    _save(model, base, root / "models" / task)
    return result


def _refuse_weak(task: str, found: dict[str, float]) -> None:
    if found["expert"] <= found["probe"]:
        raise WeakExpert(
            f"{task}: accuracy {found['expert']:.3f} on validation does not beat the probe on the frozen base, "
            f"{found['probe']:.3f}\n  hint: raise experts.{task}.steps or .learning_rate in the settings"
        )


def seconds_per_work(how: Training) -> float:
    """Seconds of one unit of work on one thread of this processor, from steps of an untrained model of this shape."""
    torch.set_num_threads(1)
    shape = BertConfig(hidden_size=384, num_hidden_layers=LAYERS, num_attention_heads=12, intermediate_size=1536)
    model = AutoModelForSequenceClassification.from_config(shape, attn_implementation="sdpa").eval()
    rows = list(range(how.batch_size))
    ids = [[1] * how.max_length for _ in rows]
    split = Split(ids, np.zeros(len(rows), dtype=np.int64))
    freeze(model.bert, {"train": split}, how.frozen_layers, lambda _: None)
    spent: list[float] = []
    works: list[int] = []
    for steps in (1, TIMED_STEPS):  # the first is slower and is not counted
        works.clear()
        began = time.perf_counter()
        finetune(model, split, Expert(steps, 1e-5), how, works.append)
        spent.append(time.perf_counter() - began)
    return spent[-1] / sum(works)
