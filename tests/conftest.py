"""Fixtures that several suites share: a tiny family of real checkpoints with real data, made from a seed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def pytest_configure(config: pytest.Config) -> None:
    # Started in the background by a shell, this process ignores SIGINT, and so would every child that is interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    # Several test processes share the cores: more threads than cores make every one of them slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1" if config.getoption("numprocesses", None) else "2")


@pytest.fixture(autouse=True)
def own_tracking_address() -> Iterator[None]:
    """MLflow keeps its address in the process and its environment: what a test sets must not reach the next."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    if "mlflow" in sys.modules:
        import mlflow

        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    if before is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="session")
def golden() -> Path:
    """The full oracle, where MODELWELD_GOLDEN names it."""
    named = os.environ.get("MODELWELD_GOLDEN")
    if not named:
        pytest.skip("MODELWELD_GOLDEN names no folder: the full oracle is not on this machine")
    path = Path(named)
    if not path.is_dir():
        pytest.skip(f"MODELWELD_GOLDEN={named} is not a folder")
    return path


@dataclass(frozen=True)
class Family:
    """A base, its experts and their data: `models/<name>`, `datasets/<task>`, tasks named like their experts."""

    root: Path
    tasks: dict[str, list[str]]

    @property
    def base(self) -> Path:
        return self.root / "models" / "base"

    def expert(self, task: str) -> Path:
        return self.root / "models" / task

    def dataset(self, task: str) -> Path:
        return self.root / "datasets" / task


WORDS = {
    "colour": {"red": "crimson scarlet ruby", "blue": "azure navy cobalt"},
    "animal": {"cat": "purr whisker kitten", "dog": "bark leash puppy", "cow": "moo milk barn"},
}
FILLER = ["the", "a", "this", "that", "was", "is", "very", "quite", "with", "under", "over", "near", "old", "new"]


def build_family(root: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2) -> Family:
    """Write a tiny BERT base, one expert a task (base plus a small delta, its own head) and separable data."""
    import pandas as pd
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    topical = sorted({word for task in WORDS.values() for words in task.values() for word in words.split()})
    vocab = {word: index for index, word in enumerate([*special, *topical, *FILLER])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    shape = {
        "vocab_size": len(vocab),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(seed)
    base = BertModel(BertConfig(**shape))
    base.save_pretrained(root / "models" / "base")
    tokenizer.save_pretrained(root / "models" / "base")

    for number, (task, classes) in enumerate(WORDS.items()):
        labels = dict(enumerate(classes))
        torch.manual_seed(seed + 1 + number)
        config = BertConfig(**shape, id2label=labels, label2id={name: index for index, name in labels.items()})
        expert = BertForSequenceClassification(config)
        expert.bert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in expert.bert.parameters():
                parameter.add_(0.1 * parameter.std().nan_to_num(0.02) * torch.randn_like(parameter))
        generator = torch.Generator().manual_seed(seed + 101 + number)
        seen: set[str] = set()
        for split, rows in {"train": 60, "validation": 20, "test": 60}.items():
            texts, targets = [], []
            while len(texts) < rows:
                target = len(texts) % len(labels)
                topic = classes[labels[target]].split()
                pick = torch.randint(0, 10_000, (7,), generator=generator).tolist()
                words = [FILLER[index % len(FILLER)] for index in pick[:6]]
                words[pick[6] % 6] = topic[pick[6] % len(topic)]
                text = " ".join(words)
                if text not in seen:
                    seen.add(text)
                    texts.append(text)
                    targets.append(target)
            folder = root / "datasets" / task
            folder.mkdir(parents=True, exist_ok=True)
            pd.DataFrame({"text": texts, "label": targets}).to_parquet(folder / f"{split}.parquet", index=False)
            if split == "train":
                fit_head(expert, tokenizer(texts, padding=True, return_tensors="pt"), torch.tensor(targets))
        expert.save_pretrained(root / "models" / task)
        tokenizer.save_pretrained(root / "models" / task)
    return Family(root, {task: list(classes) for task, classes in WORDS.items()})


def fit_head(expert: Any, batch: Any, targets: Any) -> None:
    """Fit the classifier by least squares on the pooled outputs, so that an expert is good at its task."""
    import copy

    import torch

    # In float64 and cut off, because the problem is ill-conditioned: plainly it gave other heads from run to run.
    backbone = copy.deepcopy(expert.bert).double().eval()
    with torch.no_grad():
        pooled = backbone(**batch).pooler_output
        features = torch.cat([pooled, torch.ones(len(pooled), 1)], dim=1)
        wanted = torch.nn.functional.one_hot(targets, expert.config.num_labels).double() * 2 - 1
        solution = torch.linalg.pinv(features, rtol=1e-7) @ wanted
        expert.classifier.weight.copy_(solution[:-1].T)
        expert.classifier.bias.copy_(solution[-1])


@pytest.fixture(scope="session")
def tiny_bert_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """One family for the whole session: read it, never write into it."""
    return build_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def fresh_family(tmp_path: Path) -> Callable[..., Family]:
    """A maker of families that a test may spoil."""

    def make(name: str = "family", **options: int) -> Family:
        return build_family(tmp_path / name, **options)

    return make


def pipeline_params(family: Family, **changes: object) -> str:
    """params.yaml over a family's own folders, as JSON (which YAML reads)."""
    document: dict[str, object] = {
        "name": "tiny",
        "models": {
            name: {"uri": str(family.root / "models" / name), "licence": "apache-2.0"}
            for name in ["base", *family.tasks]
        },
        "datasets": {task: {"uri": str(family.dataset(task)), "licence": "cc0-1.0"} for task in family.tasks},
        "tasks": {task: {"model": task, "dataset": task, "max_length": 16} for task in family.tasks},
        "validate": {"min_rows": 50},
        "merge": {"method": "drm", "direction": "horizontal", "drop_rate": 0.5},
        "baselines": {"average": {"method": "average"}},
        "evaluate": {"bootstrap": 50},
        "register": {"min_relative": 0.0},
    }
    return json.dumps(document | changes, indent=2)
