"""A family in which experts are PEFT adapters: real ones, good at their tasks, beside whole finetunes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tests.conftest import Family, fit_head


def write_classifier_adapter(
    family: Family, out: Path, dataset: str, *, labels: list[str] | None = None, seed: int = 0, **lora: Any
) -> Path:
    """Save an adapter of the family's base that classifies `dataset`, with config.json beside it only with `labels`."""
    import pandas
    import peft
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    rows = pandas.read_parquet(family.dataset(dataset) / "train.parquet")
    count = int(rows["label"].max()) + 1
    model = BertForSequenceClassification.from_pretrained(family.base, num_labels=count)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}
    adapter = peft.get_peft_model(model, peft.LoraConfig(**(settings | lora)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    folded = copy.deepcopy(adapter).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    batch = tokenizer(list(rows["text"]), padding=True, return_tensors="pt")
    fit_head(folded, batch, torch.tensor(rows["label"].to_numpy()))
    saved = adapter.base_model.model.classifier.modules_to_save["default"]
    saved.load_state_dict(folded.classifier.state_dict())
    adapter.save_pretrained(out)
    if labels is not None:
        named = {name: index for index, name in enumerate(labels)}
        architectures = ["BertForSequenceClassification"]
        config = BertConfig.from_pretrained(
            family.base, architectures=architectures, id2label=dict(enumerate(labels)), label2id=named
        )
        config.save_pretrained(out)
    return out
