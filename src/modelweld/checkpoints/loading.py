"""Models out of merged directories: with one task's head on, as transformers classes or as plain directories."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modelweld.checkpoints.adapter import is_adapter
from modelweld.checkpoints.checkpoint import Checkpoint, read_json, require_inside
from modelweld.checkpoints.folding import Folded
from modelweld.checkpoints.header import TensorInfo
from modelweld.checkpoints.shards import ShardFile, lay_out
from modelweld.errors import CheckpointError, ConfigError

HEADS = "heads"
HEAD_WEIGHTS = "head.safetensors"
PREFIX_KEY = "modelweld.prefix"
REFERENCE_PREFIX_KEY = "modelweld.reference_prefix"
WEIGHTS = re.compile(r"\.safetensors(\.index\.json)?$|\.bin(\.index\.json)?$|^manifest\.json$|^README\.md$|^heads$")

# What an architecture's name ends in, and transformers' family of classes for it.
_FAMILIES = {
    "ForSequenceClassification": "SEQUENCE_CLASSIFICATION",
    "ForTokenClassification": "TOKEN_CLASSIFICATION",
    "ForQuestionAnswering": "QUESTION_ANSWERING",
    "ForMultipleChoice": "MULTIPLE_CHOICE",
    "ForImageClassification": "IMAGE_CLASSIFICATION",
    "ForMaskedLM": "MASKED_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_TO_SEQ_CAUSAL_LM",
}
_BLOCK = 1 << 20


def tasks(path: str | Path) -> list[str]:
    """The tasks whose heads a merged directory holds, sorted; none for a plain model directory."""
    return sorted(file.parent.name for file in Path(path).glob(f"{HEADS}/*/{HEAD_WEIGHTS}"))


def load(path: str | Path, task: str | None = None, device: str = "cpu", *, base: str | Path | None = None) -> Any:
    """The transformers model in a directory, in evaluation mode: with the head of `task`, or as its config says.

    >>> from transformers import BertConfig, BertModel
    >>> size = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> BertModel(BertConfig(**size, intermediate_size=4)).save_pretrained("model")
    >>> type(load("model")).__name__
    'BertModel'

    A merged directory without a task gives its backbone. A plain Hugging Face directory has one head at most, and
    `task` is then only its name. A PEFT adapter is folded into the model in `base`, in float32. Raises ConfigError for
    a task without a head and an adapter without a base, CheckpointError for missing weights.
    """
    from transformers import AutoConfig

    if is_adapter(path):
        return _load_adapter(Path(path), task, base).to(device).eval()
    root = _directory(path)
    if task is None or not (root / HEADS).is_dir():
        config = AutoConfig.from_pretrained(root, local_files_only=True)
        model, report = _model_class(config).from_pretrained(root, output_loading_info=True, local_files_only=True)
    else:
        head = _head_directory(root, task)
        config = AutoConfig.from_pretrained(head, local_files_only=True)
        state = _state(root, head)
        model, report = _model_class(config).from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    if task is not None or not (root / HEADS).is_dir():
        _require_whole(report, root)
    return model.to(device).eval()


def load_under_head(head: str | Path, base: str | Path) -> Any:
    """The base's own model under the head of an adapter of it: what it knows without any finetuning."""
    return _load_adapter(Path(head), None, base, adapted=False).eval()


def config_of(path: str | Path, task: str | None = None, base: str | Path | None = None) -> dict[str, Any]:
    """The config.json of the model that `load` gives for the same arguments; empty when there is none."""
    root = Path(path)
    if task is not None and (root / HEADS).is_dir():
        return read_json(_head_directory(root, task) / "config.json")
    if is_adapter(root):
        with Folded.onto(base, root) as model:
            return model.config
    file = root / "config.json"
    return read_json(file) if file.is_file() else {}


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(path) if is_adapter(path) else _directory(path), local_files_only=True)


def export(path: str | Path, task: str | None, out: str | Path, *, base: str | Path | None = None) -> Path:
    """Write a merged model, with one task's head on, as a plain Hugging Face directory that needs no modelweld.

    Tensors get the names of the task's own architecture; config.json is the head's, tokenizer and generation files
    the merge's. An adapter is folded into the model in `base`, whose dtypes and files it takes. Returns `out`. Raises
    ConfigError when `out` exists and holds anything.
    """
    adapter = is_adapter(path)
    root, target = Path(path) if adapter else _directory(path), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("exists and is not empty", where=str(target), hint="name a new directory")
    found = tasks(root)
    if task is None and found:
        raise ConfigError(f"has heads for {', '.join(found)}", where=str(root), hint="choose one with --task")
    # An adapter that is no merge has one head at most, and `task` is then only its name.
    head = _head_directory(root, task) if task is not None and (found or not adapter) else None
    with Folded.onto(base, root, rounded=True) if adapter else Checkpoint.open(root) as backbone:
        config = backbone.config if adapter else None
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(_directory(base).iterdir() if adapter and base is not None else root.iterdir()):
            if file.is_file() and not WEIGHTS.search(file.name):
                require_inside(file, file.parent)
                shutil.copyfile(file, target / file.name)
        if head is not None:
            shutil.copyfile(head / "config.json", target / "config.json")
        elif config is not None:
            text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
            (target / "config.json").write_text(text + "\n", encoding="utf-8")
        if head is None:
            _copy([(name, backbone, info) for name, info in backbone.tensors.items()], target)
        else:
            with Checkpoint.open(head / HEAD_WEIGHTS) as weights:
                _copy(_joined(backbone, weights, head), target)
    return target


def _joined(backbone: Checkpoint, weights: Checkpoint, head: Path) -> list[tuple[str, Checkpoint, TensorInfo]]:
    prefix, reference_prefix = _head_prefixes(head)
    joined: dict[str, tuple[str, Checkpoint, TensorInfo]] = {}
    for name, info in backbone.tensors.items():
        stored = prefix + name.removeprefix(reference_prefix)
        joined[stored] = (stored, backbone, info)
    # A head may carry layers of its own that the backbone has too (a pooler): the task's are meant.
    joined.update({name: (name, weights, info) for name, info in weights.tensors.items()})
    return list(joined.values())


def _copy(entries: list[tuple[str, Checkpoint, TensorInfo]], target: Path) -> None:
    layout = lay_out([(name, info.dtype, info.shape) for name, _, info in entries], shard_bytes=5_000_000_000)
    sources = {name: (checkpoint, info.name) for name, checkpoint, info in entries}
    buffer = memoryview(bytearray(_BLOCK))
    for shard in layout.shards:
        out = ShardFile(shard, target)
        try:
            for slot in shard.slots:
                checkpoint, stored = sources[slot.name]
                for start in range(0, slot.nbytes, _BLOCK):
                    part = buffer[: min(_BLOCK, slot.nbytes - start)]
                    checkpoint.read_into(stored, start, part)
                    out.write(slot, start, part)
            out.sync()
        finally:
            out.close()
    index = layout.index()
    if index is not None:
        (target / "model.safetensors.index.json").write_bytes(index)


def _load_adapter(root: Path, task: str | None, base: str | Path | None, *, adapted: bool = True) -> Any:
    import transformers

    head = _head_directory(root, task) if task is not None and (root / HEADS).is_dir() else None
    with Folded.onto(base, root, adapted=adapted) as model:
        document = model.config if head is None else read_json(head / "config.json")
        state = {name: model.read(name) for name in model.tensors}
    if head is not None:
        from safetensors.torch import load_file

        prefix, reference_prefix = _head_prefixes(head)
        state = {prefix + name.removeprefix(reference_prefix): tensor for name, tensor in state.items()}
        state.update(load_file(head / HEAD_WEIGHTS))
    kind = document.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"transformers knows no model type {kind!r}", where=f"{base}/config.json")
    config = transformers.CONFIG_MAPPING[kind].from_dict(document)
    loaded, report = _model_class(config).from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32
    )
    _require_whole(report, root)
    return loaded


def _require_whole(report: Mapping[str, Any], root: Path) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights are not in the checkpoint, first {missing[0]!r}",
            where=str(root),
            hint="the directory is incomplete: merge or fetch it again",
        )


def _state(root: Path, head: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    prefix, reference_prefix = _head_prefixes(head)
    state: dict[str, torch.Tensor] = {}
    with Checkpoint.open(root) as backbone:
        for file in backbone.files:
            for name, tensor in load_file(file).items():
                state[prefix + name.removeprefix(reference_prefix)] = tensor
    state.update(load_file(head / HEAD_WEIGHTS))
    return state


def _head_prefixes(head: Path) -> tuple[str, str]:
    from safetensors import safe_open

    with safe_open(head / HEAD_WEIGHTS, framework="pt") as opened:
        metadata = opened.metadata() or {}
    return metadata.get(PREFIX_KEY, ""), metadata.get(REFERENCE_PREFIX_KEY, "")


def _head_directory(root: Path, task: str) -> Path:
    found = tasks(root)
    if task not in found:
        known = f"it has heads for {', '.join(found)}" if found else "it has no heads"
        raise ConfigError(f"no head for task {task!r}; {known}", where=str(root), hint="name one of its tasks")
    return root / HEADS / task


def _model_class(config: Any) -> Any:
    import transformers

    for architecture in config.architectures or ():
        for ending, family in _FAMILIES.items():
            mapping = getattr(transformers, f"MODEL_FOR_{family}_MAPPING")
            if architecture.endswith(ending) and type(config) in mapping:
                return mapping[type(config)]
    if type(config) not in transformers.MODEL_MAPPING:
        raise CheckpointError(
            f"transformers has no model class for {type(config).__name__}", hint="use a supported architecture"
        )
    return transformers.MODEL_MAPPING[type(config)]


def _directory(path: str | Path) -> Path:
    root = Path(path)
    if not root.is_dir():
        raise ConfigError("no such model directory", where=str(root), hint="merge first, or check the path")
    try:
        json.loads((root / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no readable config.json: {error}", where=str(root)) from error
    return root
