"""Systems to evaluate: a backbone with one task's head, its digest, and the transformers model of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelweld.checkpoints.adapter import is_adapter
from modelweld.checkpoints.checkpoint import Checkpoint
from modelweld.checkpoints.digests import content_digest
from modelweld.checkpoints.loading import config_of, load, load_under_head
from modelweld.checkpoints.names import is_buffer, match_names
from modelweld.errors import CheckpointError, InputError
from modelweld.evaluation.cache import content_key
from modelweld.evaluation.kinds import kind_of
from modelweld.evaluation.labels import LabelSpace
from modelweld.evaluation.settings import Settings
from modelweld.evaluation.texts import TOKENIZER_FILES
from modelweld.kinds import DEFAULT


@dataclass(frozen=True)
class System:
    """What is scored under one name: `backbone` with its own head of `task`, or with the head of another model.

    `head_from` is the model whose head is used where the backbone, a whole model, has none: the base with the expert's
    head is what the base knows without any finetuning. `base` is what adapters are folded into.
    """

    name: str
    backbone: Path
    task: str | None = None
    head_from: Path | None = None
    base: Path | None = None

    @property
    def side_files(self) -> Path:
        """Where its tokenizer and the like are: an adapter may have been saved without any, and uses its base's."""
        if self.base is None or not is_adapter(self.backbone):
            return self.backbone
        return self.backbone if any((self.backbone / name).is_file() for name in TOKENIZER_FILES) else self.base


def prediction_key(system: System, model: str, inputs: str, dataset: str, space: LabelSpace, settings: Settings) -> str:
    """The cache key of a system's predictions on one set; `inputs` is the digest of its tokenizer or processor."""
    return content_key(
        {
            "model": model,
            "task": system.task,
            "tokenizer": inputs,
            "dataset": dataset,
            "classes": list(space.names),
            "settings": settings.data(),
        }
    )


def open_system(system: System, kind: str = DEFAULT) -> Any:
    """The system's transformers model on the CPU; CheckpointError when a head or a part of the backbone is missing."""
    head_from = system.head_from or system.backbone
    adapter_head = system.head_from is not None and is_adapter(system.head_from)
    model = (
        load_under_head(head_from, system.backbone)
        if adapter_head
        else load(head_from, task=system.task, base=system.base)
    )
    expected = kind_of(kind)
    if not type(model).__name__.endswith(expected.architecture):
        raise CheckpointError(
            f"{type(model).__name__} classifies no {expected.noun}",
            where=str(head_from),
            hint=f"an expert is saved as a …{expected.architecture}, which its config.json names",
        )
    if system.head_from is None or adapter_head:
        return model
    state = model.state_dict()
    with Checkpoint.open(system.backbone) as backbone, Checkpoint.open(system.head_from) as head:
        name_map = match_names(backbone, head, str(system.head_from))
        if any(stored not in state and not is_buffer(stored) for stored in name_map.names.values()):
            return _converted(model, head, {stored: backbone.read(name) for name, stored in name_map.names.items()})
        with torch.no_grad():
            for name, stored in name_map.names.items():
                if stored in state:
                    state[stored].copy_(backbone.read(name))
    return model


def _converted(model: Any, head: Checkpoint, backbone: Mapping[str, torch.Tensor]) -> Any:
    """The model with a backbone whose tensors have other names on disk than in memory, as transformers renames them."""
    state = {name: head.read(name) for name in head.tensors} | dict(backbone)
    loaded, report = type(model).from_pretrained(
        None, config=model.config, state_dict=state, output_loading_info=True, dtype=torch.float32
    )
    unexpected = sorted(name for name in {*report["unexpected_keys"], *report["missing_keys"]} if not is_buffer(name))
    if unexpected:
        stored = next((name for name in backbone if name in unexpected), unexpected[0])
        raise CheckpointError(
            f"tensor {stored!r} of the file has no place in {type(model).__name__}",
            where=head.place(stored) if stored in head.tensors else str(head.path),
            hint="load the model with this version of transformers and save it again",
        )
    return loaded.eval()


def model_digest(system: System) -> str:
    """One digest for the weights and configs that make this system, the head's model and an adapter's base included."""
    parts = {"backbone": content_digest(system.backbone)}
    if system.head_from is not None:
        parts["head"] = content_digest(system.head_from)
    models = [system.backbone, *([system.head_from] if system.head_from is not None else [])]
    if system.base is not None and any(is_adapter(path) for path in models):
        parts["base"] = content_digest(system.base)
    return parts["backbone"] if len(parts) == 1 else content_key(parts)


def classes_of(model: Path, task: str | None = None, base: Path | None = None, kind: str = DEFAULT) -> LabelSpace:
    """The classes of a model's head, or of that of one task; InputError where nothing names them."""
    document = config_of(model, task, base)
    if not document:
        raise InputError(
            "no config.json, so nothing says which classes its head has",
            where=str(model),
            hint="name a task that the model has a head for: the folders of heads/",
        )
    return kind_of(kind).classes(document, str(model))
