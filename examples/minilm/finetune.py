"""Stages `base` and `expert`: the base model, and one expert a task finetuned from it.

An expert starts from a linear probe: a logistic regression on the frozen base's pooled output becomes the
classification head, so the few steps that follow go into the backbone. The word embeddings stay as they are. It is
refused unless it beats, on the validation split, the best probe the frozen base allows (its averaged token vectors,
as the base was trained to be used): otherwise there would be nothing in its weights worth merging.

Run it through the pipeline: python examples/minilm/prepare.py
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

HERE = Path(__file__).resolve().parent
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
SPLITS = ("train", "validation", "test")


class WeakExpert(Exception):
    """Finetuning did not beat the probe on the frozen base."""


@dataclass(frozen=True)
class Training:
    """How experts are finetuned; `precision` auto takes bfloat16 where the processor multiplies it in hardware."""

    seed: int
    threads: int
    precision: str
    max_length: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float
    probe_strengths: list[float]

    def dtype(self) -> torch.dtype:
        """The dtype of the working copy; the weights that are trained and saved are float32 either way."""
        if self.precision == "auto":
            return torch.bfloat16 if _bfloat16_is_fast() else torch.float32
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.precision]


def _bfloat16_is_fast() -> bool:
    # Without these instructions bfloat16 is emulated, slower than float32; only Linux on x86 says so in a file.
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8", errors="replace").split() if cpu.is_file() else []
    return "amx_bf16" in flags or "avx512_bf16" in flags


@dataclass(frozen=True)
class Split:
    """Token ids and label ids of one split."""

    ids: list[list[int]]
    labels: np.ndarray


def save_base(package: Path, out: Path) -> None:
    """The package's model as a Hugging Face directory with the tensors its experts have, pooler included."""
    model = AutoModel.from_pretrained(package, dtype=torch.float32)
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    _copy_tokenizer(package, out)


def _copy_tokenizer(source: Path, out: Path) -> None:
    # Byte for byte, so that base and experts are seen to share one tokenizer.
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def read_splits(folder: Path, tokenizer: Any, max_length: int) -> tuple[list[str], dict[str, Split]]:
    """The label names, sorted, and every split of a task as token ids."""
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


def _padded(tokenizer: Any, ids: list[list[int]], rows: list[int]) -> Any:
    return tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")


def features(backbone: Any, tokenizer: Any, split: Split) -> dict[str, np.ndarray]:
    """What a probe may see of the frozen base: `pooled` (what a head gets) and `mean` (averaged token vectors)."""
    found: dict[str, list[Any]] = {"pooled": [None] * len(split.ids), "mean": [None] * len(split.ids)}
    with torch.inference_mode():
        for rows in batches(split.ids, 64):
            inputs = _padded(tokenizer, split.ids, rows)
            output = backbone(**inputs)
            mask = inputs["attention_mask"].unsqueeze(-1).float()  # (B, L, 1)
            mean = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)  # (B, d)
            for at, row in enumerate(rows):
                found["pooled"][row] = output.pooler_output[at].float().numpy()
                found["mean"][row] = mean[at].numpy()
    return {name: np.stack(vectors) for name, vectors in found.items()}


def best_probe(
    train: np.ndarray, train_y: np.ndarray, held: np.ndarray, held_y: np.ndarray, c: list[float]
) -> Pipeline:
    """The logistic regression whose strength of regularisation does best on the held-out split."""
    fitted = []
    with threadpool_limits(1):
        for strength in c:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200))
            fitted.append(probe.fit(train, train_y))
        return max(fitted, key=lambda probe: probe.score(held, held_y))


def set_head(head: torch.nn.Linear, probe: Pipeline) -> None:
    """Make the head predict what the probe predicts: the scaler is folded in, two classes get opposite logits."""
    scaler, regression = probe[0], probe[1]
    weight = regression.coef_ / scaler.scale_  # (labels or 1, d)
    bias = regression.intercept_ - weight @ scaler.mean_
    if weight.shape[0] == 1:
        weight, bias = np.vstack([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))


def predict(model: Any, tokenizer: Any, split: Split) -> np.ndarray:
    """The predicted label id of every row."""
    predicted = np.zeros(len(split.ids), dtype=np.int64)
    model.eval()
    with torch.inference_mode():
        for rows in batches(split.ids, 64):
            predicted[rows] = model(**_padded(tokenizer, split.ids, rows)).logits.argmax(-1).numpy()
    return predicted


def finetune(model: Any, tokenizer: Any, train: Split, steps: int, how: Training) -> None:
    """Train `model` in place: a working copy in `how.dtype()` gives the gradients, AdamW moves the float32 weights."""
    masters = [weight for weight in model.parameters() if weight.requires_grad]
    worker = copy.deepcopy(model).to(how.dtype()).train()
    copies = [weight for weight in worker.parameters() if weight.requires_grad]
    matrices = [weight for weight in masters if weight.ndim > 1]
    vectors = [weight for weight in masters if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": how.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=how.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    warm = max(1, round(how.warmup * steps))
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    targets = torch.tensor(train.labels)
    for step, rows in enumerate(schedule(train.ids, how.batch_size, steps, how.seed), start=1):
        logits = worker(**_padded(tokenizer, train.ids, rows)).logits.float()  # (B, labels)
        loss = torch.nn.functional.cross_entropy(logits, targets[rows])
        loss.backward()
        for master, low in zip(masters, copies, strict=True):
            master.grad = low.grad.float()
            low.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        pace.step()
        with torch.no_grad():
            for master, low in zip(masters, copies, strict=True):
                low.copy_(master)
        if step % 50 == 0 or step == steps:
            print(f"  step {step}/{steps}, loss {loss.item():.3f}", flush=True)
    optimizer.zero_grad(set_to_none=True)


def scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy and macro F1, four digits."""
    return {
        "accuracy": round(float((truth == predicted).mean()), 4),
        "macro_f1": round(float(f1_score(truth, predicted, average="macro")), 4),
    }


def make_expert(task: str, root: Path, steps: int, how: Training) -> dict[str, Any]:
    """models/<task>/ and metrics/<task>.json; raises WeakExpert, keeping neither, when the probe is not beaten."""
    clock = [time.perf_counter()]
    torch.set_num_threads(how.threads)
    torch.manual_seed(how.seed)
    base = root / "models" / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    names, splits = read_splits(root / "texts" / task, tokenizer, how.max_length)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        dtype=torch.float32,
        attn_implementation="eager",  # faster here than the fused kernel: the sequences are short
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        # Drawing dropout masks takes a quarter of a step on a CPU and one epoch and a half hardly overfits.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    backbone = AutoModel.from_pretrained(base, dtype=how.dtype(), attn_implementation="eager").eval()
    seen = {name: features(backbone, tokenizer, split) for name, split in splits.items()}
    probes = {
        view: best_probe(
            seen["train"][view],
            splits["train"].labels,
            seen["validation"][view],
            splits["validation"].labels,
            how.probe_strengths,
        )
        for view in ("pooled", "mean")
    }
    set_head(model.classifier, probes["pooled"])
    clock.append(time.perf_counter())

    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    finetune(model, tokenizer, splits["train"], steps, how)
    clock.append(time.perf_counter())

    # Judged in the probes' precision; the pipeline at the root evaluates what is saved.
    judged = copy.deepcopy(model).to(how.dtype())
    result: dict[str, Any] = {"task": task, "labels": len(names), "steps": steps}
    for name in ("validation", "test"):
        truth = splits[name].labels
        result[name] = {
            "expert": scores(truth, predict(judged, tokenizer, splits[name])),
            "probe": scores(truth, probes["mean"].predict(seen[name]["mean"])),
            "head_before_finetuning": scores(truth, probes["pooled"].predict(seen[name]["pooled"])),
        }
    clock.append(time.perf_counter())
    spans = [round(after - before, 1) for before, after in pairwise(clock)]
    result["seconds"] = dict(zip(("probe", "finetune", "evaluate"), spans, strict=True))
    _refuse_weak(task, result["validation"])
    _save(model, base, root / "models" / task)
    path = root / "metrics" / f"{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return result


def _refuse_weak(task: str, validation: dict[str, dict[str, float]]) -> None:
    expert, probe = validation["expert"]["accuracy"], validation["probe"]["accuracy"]
    if expert <= probe:
        raise WeakExpert(
            f"{task}: accuracy {expert:.3f} on validation does not beat the probe on the frozen base, {probe:.3f}\n"
            f"  hint: raise experts.{task}.steps or .learning_rate in examples/minilm/settings.yaml"
        )


def _save(model: Any, base: Path, out: Path) -> None:
    defaults = json.loads((base / "config.json").read_text(encoding="utf-8"))
    model.config.hidden_dropout_prob = defaults["hidden_dropout_prob"]
    model.config.attention_probs_dropout_prob = defaults["attention_probs_dropout_prob"]
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    _copy_tokenizer(base, out)


def main(name: str, root: Path = HERE) -> None:
    """The stage `base`, or `expert@<name>`."""
    if name == "base":
        save_base(root / "packages" / "minilm", root / "models" / "base")
        return
    settings = yaml.safe_load((root / "settings.yaml").read_text(encoding="utf-8"))
    how = Training(**settings["training"], learning_rate=settings["experts"][name]["learning_rate"])
    result = make_expert(name, root, settings["experts"][name]["steps"], how)
    test = result["test"]
    print(f"{name}: test accuracy {test['expert']['accuracy']:.3f}, probe {test['probe']['accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except WeakExpert as problem:
        sys.exit(f"examples/minilm: {problem}")
