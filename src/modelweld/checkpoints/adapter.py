"""LoRA adapters as PEFT writes them: which weights of a base they change, by which low-rank deltas or whole tensors.

Only what has one meaning is read; variants whose delta is not scaling · B A (DoRA and the rest), and adapters whose
initialisation has changed the base (PiSSA and similar), are refused by name.

    adapter = Adapter.open("adapters/sst2", base, "sst2")
    B, A = adapter.factors("encoder.layer.0.attention.self.query.weight", adapter.checkpoint.read)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from modelweld.checkpoints.checkpoint import Checkpoint, read_json
from modelweld.checkpoints.digests import tensor_digest
from modelweld.checkpoints.names import NameMap, has_task_head
from modelweld.checkpoints.orientation import stored_transposed
from modelweld.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WRAPPING = "base_model.model."

# Initialisations that leave the base as it was; the others store a delta to a base that they have rewritten.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "velora_config",
)
# Read here, or of no consequence for a trained adapter's meaning.
_KNOWN = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "bias",
        "fan_in_fan_out",
        "init_lora_weights",
        "modules_to_save",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "task_type",
        "inference_mode",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "peft_version",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    ]
)
# PEFT's names of tasks with a head of their own, and transformers' of the classes that have it.
_CLASSIFIERS = {"SEQ_CLS": "SEQUENCE_CLASSIFICATION", "TOKEN_CLS": "TOKEN_CLASSIFICATION"}
_OUTPUT_LAYER = re.compile(r"(^|\.)(classifier|score|out_proj)\.weight$")
_PAIR = re.compile(r"^(?P<module>.+)\.(lora_(?P<side>[AB])\.weight|lora_embedding_(?P<table>[AB]))$")


@dataclass(frozen=True)
class Pair:
    """The two stored factors of one weight's delta, scaling · B A, and whether the weight is stored transposed.

    `table`: an embedding's factors, whose delta is (scaling · B A)ᵀ in the layout of the weight.
    """

    A: str
    B: str
    rank: int
    scaling: float
    table: bool
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter and its base.

    `checkpoint` holds the adapter's tensors and, under their own names, the base's, whose weights the adapter has left
    alone. `pairs` and `name_map.names` are by the base's names; `touched` are the base's tensors that the adapter
    changes in either way.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    touched: frozenset[str]
    name_map: NameMap

    @classmethod
    def open(cls, path: str | Path, base: Checkpoint, label: str) -> Self:
        """The adapter in a directory.

        Raises CheckpointError naming the adapter, called `label`, for another kind of adapter, for a variant of LoRA
        that is no plain low-rank delta, and for factors that do not fit the base.
        """
        path = Path(path)
        config = read_json(path / CONFIG)
        _refuse_variants(config, label, path / CONFIG)
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(
                f"{label} is an adapter without {WEIGHTS}", where=str(path), hint="save it with safe_serialization=True"
            )
        with Checkpoint.open(path / WEIGHTS) as own:
            reading = _Reading(own, base, label, config)
            reading.sort()
            return cls(own.combined_with(base), config, reading.pairs, reading.touched, reading.name_map())

    def factors(self, name: str, read: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """B (n, r) and A (r, m) of a weight's delta B @ A, in float64, in the layout of the weight, scaling folded in.

        `name` is a key of `pairs`; `read` reads a stored tensor.
        """
        pair = self.pairs[name]
        # `read` may hand out one buffer again and again, so both factors are copies.
        left, right = read(pair.B).double() * pair.scaling, read(pair.A).to(torch.float64, copy=True)
        return (right.mT, left.mT) if pair.table or pair.transposed else (left, right)

    def config_on(self, base: Checkpoint) -> dict[str, Any]:
        """The config.json of the model that adapter and base make: of the adapter's head, or else the base's.

        Raises CheckpointError for a head whose architecture is unknown.
        """
        head = {name: self.checkpoint.tensors[name] for name in self.name_map.head}
        found = head_config(self, base, head) if head else base.config
        if not found:
            raise CheckpointError(
                f"the adapter's head ({next(iter(head), 'none')}) could be of several architectures",
                where=str(self.checkpoint.path),
                hint="put the config.json of the model that was finetuned beside the adapter",
            )
        return found


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds a PEFT adapter rather than a model."""
    return (Path(path) / CONFIG).is_file() and not any(Path(path).glob("model*.safetensors*"))


def write_config(directory: Path, ranks: Mapping[str, int], experts: Mapping[str, Any]) -> None:
    """Write the adapter_config.json of an adapter with scaling 1 and the given rank per module.

    Task and base are those of `experts`, the config of one of the merged adapters.
    """
    rank = max(ranks.values())
    others = {module: own for module, own in sorted(ranks.items()) if own != rank}
    document = {
        "peft_type": "LORA",
        # A classifier's task would make PEFT look for its head in the adapter; heads are stored apart, one per task.
        "task_type": None if experts.get("task_type") in _CLASSIFIERS else experts.get("task_type"),
        "base_model_name_or_path": experts.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {re.escape(module): own for module, own in others.items()},
        "alpha_pattern": {re.escape(module): own for module, own in others.items()},
        "target_modules": sorted(ranks),
        "fan_in_fan_out": bool(experts.get("fan_in_fan_out")),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    (directory / CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Shaped(Protocol):
    """A tensor, or what is known of one that was not read."""

    @property
    def shape(self) -> Sequence[int]:
        """Its extents."""


def head_config(adapter: Adapter, base: Checkpoint, head: Mapping[str, Shaped]) -> dict[str, Any]:
    """The config.json of the model that an adapter's head belongs to; empty when it is unknown.

    It is the adapter's own when it has one. PEFT does not write any: then it is the base's, with the architecture that
    transformers gives to the adapter's task and as many labels as the head has outputs.
    """
    if adapter.checkpoint.config:
        return adapter.checkpoint.config
    family = _CLASSIFIERS.get(str(adapter.config.get("task_type")))
    matrices = {name: tensor.shape[0] for name, tensor in head.items() if len(tensor.shape) == 2}
    if family is None or not matrices:
        return {}
    from transformers.models.auto import modeling_auto

    known: Mapping[str, str] = getattr(modeling_auto, f"MODEL_FOR_{family}_MAPPING_NAMES")
    architecture = known.get(str(base.config.get("model_type")))
    if architecture is None:
        return {}
    # A head may have hidden layers of its own; the last layer gives the outputs.
    last = {name: rows for name, rows in matrices.items() if _OUTPUT_LAYER.search(name)} or matrices
    labels = {str(index): f"LABEL_{index}" for index in range(min(last.values()))}
    return {
        **base.config,
        "architectures": [architecture],
        "id2label": labels,
        "label2id": {label: int(index) for index, label in labels.items()},
    }


class _Reading:
    """One adapter's tensors sorted into pairs, whole tensors and a head."""

    def __init__(self, own: Checkpoint, base: Checkpoint, label: str, config: Mapping[str, Any]) -> None:
        self.own, self.base, self.label, self.config = own, base, label, config
        self.transposed = stored_transposed(base)
        self.pairs: dict[str, Pair] = {}
        self.whole: dict[str, str] = {}
        self.head: list[str] = []
        self.prefix, self.reference_prefix = "", ""

    @property
    def touched(self) -> frozenset[str]:
        return frozenset(self.pairs) | frozenset(self.whole)

    def name_map(self) -> NameMap:
        names = {name: name for name in self.base.tensors} | self.whole
        names |= {name: pair.B for name, pair in self.pairs.items()}
        return NameMap(names, tuple(sorted(self.head)), self.prefix, self.reference_prefix)

    def sort(self) -> None:
        factors: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for stored in self.own.tensors:
            name = stored.removeprefix(WRAPPING)
            found = _PAIR.match(name)
            if found:
                kind = "A" if "A" in (found["side"], found["table"]) else "B"
                side = f"table {kind}" if found["table"] else kind
                factors.setdefault(found["module"], {})[side] = stored
            elif ".original_module." not in name and ".modules_to_save." not in name:
                if re.search(r"\.(lora_|token_adapter|vera_|hada_|oft_|ia3_)", name):
                    raise self._bad(f"holds {stored!r}, which no plain LoRA has", stored)
                whole[name.replace(".base_layer.", ".")] = stored
        modules = [f"{module}.weight" for module in factors]
        self.prefix, self.reference_prefix = self._prefixes([*modules, *whole])
        for module, sides in factors.items():
            self._pair(module, sides)
        for name, stored in whole.items():
            self._whole(name, stored)

    def _prefixes(self, names: list[str]) -> tuple[str, str]:
        """What to take off the adapter's names, and put before them, so that most are the base's."""
        mine = ["", *sorted({name.split(".", 1)[0] + "." for name in names})]
        theirs = ["", *sorted({name.split(".", 1)[0] + "." for name in self.base.tensors if "." in name})]
        best, agreeing = ("", ""), -1
        for prefix in mine:
            stripped = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            for other in theirs:
                count = sum(other + name in self.base.tensors for name in stripped)
                if count > agreeing:
                    best, agreeing = (prefix, other), count
        return best

    def _named(self, name: str) -> str | None:
        """The base's name for one of the adapter's; None when the base has no such tensor."""
        if not name.startswith(self.prefix):
            return None
        found = self.reference_prefix + name.removeprefix(self.prefix)
        if found not in self.base.tensors:
            return None
        own_head = has_task_head(self.base) and "." in found and not found.startswith(self._backbone())
        return None if own_head else found

    def _backbone(self) -> str:
        counts: dict[str, int] = {}
        for name in self.base.tensors:
            counts[name.split(".", 1)[0] + "."] = counts.get(name.split(".", 1)[0] + ".", 0) + 1
        return max(sorted(counts), key=lambda component: counts[component])

    def _pair(self, module: str, sides: Mapping[str, str]) -> None:
        name, any_stored = self._named(f"{module}.weight"), next(iter(sides.values()))
        if name is None:
            raise self._bad(
                f"adapts {module}, and the base has no weight of that name", any_stored, "name the adapter's own base"
            )
        table = set(sides) == {"table A", "table B"}
        if not table and set(sides) != {"A", "B"}:
            raise self._bad(f"holds only one of the two factors of {module}", any_stored)
        A, B = (sides["table A"], sides["table B"]) if table else (sides["A"], sides["B"])
        left, right = self.own.tensors[B].shape, self.own.tensors[A].shape
        if 0 in left or 0 in right:
            raise self._bad(
                f"adapts {module} by empty factors {list(left)} and {list(right)}, as DeepSpeed's ZeRO-3 leaves them",
                B,
                "save it again with stage3_gather_16bit_weights_on_model_save, or rebuild it with zero_to_fp32.py",
            )
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise self._bad(
                f"adapts {module} by factors {list(left)} and {list(right)}, which are not a matrix's",
                B,
                "leave convolutions out, or fold this adapter with PEFT's merge_and_unload()",
            )
        shape, rank = self.base.tensors[name].shape, left[1]
        asked = int(self._of("rank_pattern", module, self.config.get("r", 8)))
        if asked != rank:
            raise self._bad(f"says rank {asked} for {module}, and its factors have rank {rank}", B)
        flipped = not table and (bool(self.config.get("fan_in_fan_out")) or name in self.transposed)
        if flipped and shape[0] != shape[-1]:
            flipped = shape == (right[1], left[0])
        expected = (right[1], left[0]) if flipped or table else (left[0], right[1])
        if shape != expected:
            raise self._bad(
                f"adapts {module} as a weight of shape {list(expected)}, the base's is {list(shape)}",
                B,
                "name the base that this adapter was trained on",
            )
        alpha = float(self._of("alpha_pattern", module, self.config.get("lora_alpha", 8)))
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        self.pairs[name] = Pair(A, B, rank, scaling, table, flipped)

    def _whole(self, name: str, stored: str) -> None:
        found, info = self._named(name), self.own.tensors[stored]
        if found is None:
            self.head.append(stored)
            return
        theirs = self.base.tensors[found]
        if info.shape != theirs.shape:
            raise self._bad(
                f"stores {name} with shape {list(info.shape)}, the base has {list(theirs.shape)}",
                stored,
                "resize the vocabulary back to the base's, or use a base with the same tokenizer",
            )
        if found in self.pairs:
            # PEFT stores a copy of an embedding along with the factors that adapt it.
            unread = self.own.headers_only or self.base.headers_only
            same = unread or tensor_digest(self.own, stored) == tensor_digest(self.base, found)
            if info.dtype != theirs.dtype or not same:
                raise self._bad(f"adapts {name} and stores another copy of it than the base's", stored)
            return
        self.whole[found] = stored

    def _of(self, pattern: str, module: str, default: Any) -> Any:
        for key, value in (self.config.get(pattern) or {}).items():
            try:
                if re.match(rf"(.*\.)?({key})$", module):
                    return value
            except re.error as error:
                raise CheckpointError(
                    f"{self.label} has the {pattern} {key!r}, which is no regular expression: {error}",
                    where=str(self.own.path.parent / CONFIG),
                ) from error
        return default

    def _bad(self, what: str, stored: str, hint: str = "save the adapter again with PEFT") -> CheckpointError:
        return CheckpointError(f"{self.label} {what}", where=self.own.place(stored), hint=hint)


def _refuse_variants(config: Mapping[str, Any], label: str, file: Path) -> None:
    kind = str(config.get("peft_type"))
    hint = "fold it into its base with PEFT's merge_and_unload() and merge the folded model"
    if kind != "LORA":
        raise CheckpointError(f"{label} is a {kind} adapter; only LORA is merged", where=str(file), hint=hint)
    unlike = [key for key in _VARIANTS if config.get(key)]
    unlike += sorted(key for key in config.keys() - _KNOWN - set(_VARIANTS) if config[key])
    if unlike:
        raise CheckpointError(
            f"{label} uses {', '.join(unlike)}, which is not a plain LoRA delta", where=str(file), hint=hint
        )
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in _INITIALISATIONS:
        raise CheckpointError(
            f"{label} was initialised by {initialisation!r}, which changes the base that its delta belongs to",
            where=str(file),
            hint="convert it to a plain LoRA: PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"{label} has a {key} that is no mapping", where=str(file))
    numbers = {key: config.get(key, 8) for key in ("r", "lora_alpha")}
    for pattern in ("rank_pattern", "alpha_pattern"):
        numbers |= {f"{pattern}, {key!r}": value for key, value in (config.get(pattern) or {}).items()}
    for key, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(
                f"{label} has {key}: {value!r}, which is no number", where=str(file), hint="save the adapter again"
            )
