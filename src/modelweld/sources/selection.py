"""Which of a source's files are fetched: one copy of the weights, what belongs to them, and no code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from modelweld.errors import SourceError
from modelweld.formats.lock import Kind

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill"})
_CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyd", ".so", ".sh", ".ipynb"})
_FOREIGN_SUFFIXES = frozenset({".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot", ".pb", ".mlmodel", ".gguf"})
_PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4"})
_DATA_SUFFIXES = frozenset({".parquet", ".csv", ".tsv", ".jsonl", ".json", ".arrow", ".txt", ".md", ".yaml", ".yml"})
_TRAINING_STATE = re.compile(r"^(training_args\.bin|(optimizer|scheduler|scaler|rng_state.*)\.(pt|pth|bin))$")
_TRAINING_FOLDER = re.compile(r"(^|/)(checkpoint-\d+|runs|global_step\d+)/")
_OTHER_COPY = re.compile(r"^(original/.*|consolidated[^/]*\.safetensors|model\.[a-z0-9]+\.safetensors)$")
_LEGAL = re.compile(r"^(licen[cs]e|notice|readme)", re.IGNORECASE)
# Pickle can hide behind any name, but transformers and torch write weights under these.
_PICKLED_WEIGHTS = re.compile(r"^(pytorch_model|model|adapter_model)([.-].*)?\.(bin|pt|pth)$")


@dataclass(frozen=True)
class Selection:
    """Names to fetch, and for each name left behind the reason."""

    wanted: tuple[str, ...]
    skipped: dict[str, str]


def select(names: Iterable[str], kind: Kind, allow_pickle: bool, where: str) -> Selection:
    """What is fetched of `names`. SourceError when only pickled weights are there, or nothing usable at all."""
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    pickles: list[str] = []
    for name in sorted(names):
        if any(part.startswith(".") for part in PurePosixPath(name).parts):
            continue
        reason = _reason(name, kind)
        if reason is not None:
            skipped[name] = reason
        elif PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES:
            pickles.append(name)
        else:
            chosen.append(name)
    if kind == "dataset":
        skipped.update(dict.fromkeys(pickles, "pickle"))
        if not any(PurePosixPath(name).suffix.lower() in {".parquet", ".csv", ".tsv", ".jsonl"} for name in chosen):
            raise SourceError(
                f"no data files{_of(pickles)}", where=where, hint="keep one .parquet, .csv or .jsonl file a split"
            )
        return Selection(tuple(chosen), dict(sorted(skipped.items())))
    if any(name.endswith(".safetensors") for name in chosen):
        for name in chosen:
            if _OTHER_COPY.match(name) and "model.safetensors" in {*chosen, *_whole(chosen)}:
                skipped[name] = "another copy of the weights"
        skipped.update(dict.fromkeys(pickles, "pickle; the safetensors are taken"))
    else:
        weights = [name for name in pickles if _PICKLED_WEIGHTS.match(name)]
        if pickles and not allow_pickle:
            raise SourceError(
                f"the weights are pickled{_of(pickles)}: reading a pickle can run code",
                where=where,
                hint="pin a revision that holds safetensors, or set `allow_pickle: true` for this source if you trust "
                "it; it is then read with weights_only=True and rewritten as safetensors",
            )
        if not weights:
            raise SourceError(
                f"no weights{_of(pickles)}",
                where=where,
                hint="a model is a Hugging Face directory: config.json beside model.safetensors",
            )
        chosen += weights
        skipped.update({name: "pickle, not weights" for name in pickles if name not in weights})
    wanted = tuple(sorted(name for name in chosen if name not in skipped))
    return Selection(wanted, dict(sorted(skipped.items())))


def _reason(name: str, kind: Kind) -> str | None:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _CODE_SUFFIXES:
        return "code is never fetched"
    if suffix in _PICTURE_SUFFIXES:
        return "picture"
    if kind == "dataset":
        known = suffix in _DATA_SUFFIXES or suffix in PICKLE_SUFFIXES or _LEGAL.match(PurePosixPath(name).name)
        return None if known else "not tabular data"
    if suffix in _FOREIGN_SUFFIXES or name.startswith(("onnx/", "openvino/", "coreml/")):
        return "weights of another framework"
    if _TRAINING_STATE.match(PurePosixPath(name).name) or _TRAINING_FOLDER.search(name):
        return "training state"
    return None


def _whole(names: list[str]) -> set[str]:
    # Shards stand for the one file that they were cut from.
    sharded = any(re.match(r"^model-\d+-of-\d+\.safetensors$", name) for name in names)
    return {"model.safetensors"} if sharded else set()


def _of(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f" ({shown})" if names else ""
