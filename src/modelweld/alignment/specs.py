"""Symmetry specs of models on disk: derived once per config and release of transformers, or read from a file."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from pydantic import ValidationError

from modelweld.checkpoints.shards import disk_errors
from modelweld.errors import ConfigError, MergeError
from modelweld.symmetry import Spec, derive_spec
from modelweld.symmetry.spec import leaves

CACHE = Path(".modelweld") / "cache" / "symmetry"
# Raised when a rule changes what is derived: older files are then derived again.
RULES_VERSION = 3
# What two models of one architecture may differ in.
_NAMES_ONLY = frozenset(("_name_or_path", "transformers_version", "id2label", "label2id", "dtype", "torch_dtype"))


@dataclass(frozen=True)
class Symmetry:
    """A model's spec and what it was derived from."""

    architecture: str
    spec: Spec

    def data(self) -> dict[str, Any]:
        """For machines: groups with the tensors they lie on, and what is frozen and why."""
        return {
            "architecture": self.architecture,
            "groups": {
                name: {"size": group.size, "within": list(group.within), "tensors": self.tensors()[name]}
                for name, group in self.spec.groups.items()
            },
            "frozen": self.frozen(),
            "unknown_operations": dict(self.spec.unknown),
        }

    def tensors(self) -> dict[str, list[str]]:
        """By group, the axes it lies on, as tensor[axis]."""
        found: dict[str, list[str]] = {name: [] for name in self.spec.groups}
        for tensor, axes in self.spec.axes.items():
            for dim, factors in enumerate(axes):
                for name in dict.fromkeys(factor.group for factor in leaves(factors) if factor.group):
                    found[name].append(f"{tensor}[{dim}]")
        return found

    def frozen(self) -> dict[str, list[str]]:
        """By reason, the axes (or their parts) that cannot be permuted, as tensor[axis]:size."""
        found: dict[str, list[str]] = defaultdict(list)
        for tensor, axes in self.spec.axes.items():
            for dim, factors in enumerate(axes):
                for factor in leaves(factors):
                    if factor.group is None and factor.size > 1:
                        found[str(factor.why)].append(f"{tensor}[{dim}]:{factor.size}")
        return dict(sorted(found.items()))


def symmetry_of(model: Path, root: Path) -> Symmetry:
    """The symmetry of a Hugging Face directory, or of a config.json; cached below `root`.

    Raises ConfigError for what is no config, MergeError naming the operation for a model that cannot be exported.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    file = model / "config.json" if model.is_dir() else model
    if not file.is_file():
        raise ConfigError("no such file", where=str(file), hint="name a Hugging Face directory or its config.json")
    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        message = str(error).strip().splitlines()[0]
        raise ConfigError(f"transformers knows no such architecture: {message}", where=str(file)) from error
    names = getattr(config, "architectures", None) or [type(config).__name__]
    return Symmetry(str(names[0]), derive_cached(config, root))


def derive_cached(config: Any, root: Path) -> Spec:
    """The spec of a transformers config: from the cache below `root`, or derived and stored there."""
    file = root / CACHE / f"{_key(config)}.json"
    if file.is_file():
        try:
            return Spec.from_json(file.read_text(encoding="utf-8"))
        except (ValueError, MergeError):
            # A file that was cut short is derived and written again below.
            file.unlink()
    text = derive_spec(config).to_json()
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    # As the cache gives it: units are matched group by group, so groups in another order give another merge.
    return Spec.from_json(text)


def load_spec(file: Path) -> Spec:
    """The spec in a file written by hand; MergeError for a file that is none, or whose groups do not fit."""
    hint = "`modelweld symmetry MODEL --spec FILE` writes one to start from"
    try:
        return Spec.from_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise MergeError(
            f"is not a symmetry spec: {place or 'the file'}: {first['msg']}", where=str(file), hint=hint
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise MergeError(f"cannot be read: {reason}", where=str(file), hint=hint) from error
    except MergeError as error:
        raise MergeError(error.what, where=f"{file}, {error.where}", hint=error.hint) from error


def _key(config: Any) -> str:
    from importlib.metadata import version

    document = {key: value for key, value in config.to_dict().items() if key not in _NAMES_ONLY}
    document["labels"] = config.num_labels
    stamp = {"config": document, "rules": RULES_VERSION, "torch": version("torch")}
    stamp["transformers"] = version("transformers")
    return blake3(json.dumps(stamp, sort_keys=True, default=str).encode()).hexdigest()[:32]
