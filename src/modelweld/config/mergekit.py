"""mergekit's YAML as a recipe, and everything in it that a recipe cannot say.

imported = convert(read_yaml(text))
imported.recipe  # a recipe file's document
imported.lost    # what would not mean the same; empty when the recipe is faithful
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelweld.errors import ConfigError

_DTYPES = {"float64", "float32", "bfloat16", "float16"}
_TOP = {"merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "name"}


@dataclass(frozen=True)
class _Kind:
    """One of mergekit's methods here: its own name, fixed parameters, which keys it reads, and its default division."""

    method: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    normalize: bool = False
    elects: bool = False


def _kind(method: str, *keys: str, normalize: bool = False, elects: bool = False, **fixed: Any) -> _Kind:
    return _Kind(method, fixed, frozenset(keys), normalize, elects)


_METHODS: Mapping[str, _Kind] = {
    "linear": _kind("linear", normalize=True),
    "task_arithmetic": _kind("task_arithmetic", "lambda"),
    "ties": _kind("ties", "density", "lambda", normalize=True, elects=True),
    "dare_ties": _kind("dare", "density", "rescale", "lambda", elects=True, combine="ties"),
    "dare_linear": _kind("dare", "density", "rescale", "lambda", combine="linear"),
    "breadcrumbs": _kind("breadcrumbs", "density", "gamma", "lambda", combine="linear"),
    "breadcrumbs_ties": _kind("breadcrumbs", "density", "gamma", "lambda", elects=True, combine="ties"),
    "della": _kind("della", "density", "epsilon", "rescale", "lambda", normalize=True, elects=True, combine="ties"),
    "della_linear": _kind("della", "density", "epsilon", "rescale", "lambda", combine="linear"),
    "slerp": _kind("slerp", "t"),
    "model_stock": _kind("model_stock"),
}
# What mergekit takes where the file says nothing.
_DEFAULTS: Mapping[str, Any] = {"density": 1.0, "gamma": 0.01, "epsilon": 0.15, "lambda": 1.0}


@dataclass(frozen=True)
class Imported:
    """A recipe file's document; what of the original it does not carry over; and remarks that change nothing."""

    recipe: dict[str, Any]
    lost: tuple[str, ...]
    notes: tuple[str, ...]


def convert(document: Any) -> Imported:
    """The recipe of a mergekit configuration.

    Raises ConfigError for methods there is no counterpart to and for files that name no whole models.
    """
    if not isinstance(document, dict) or "merge_method" not in document:
        raise ConfigError("is no mergekit configuration", hint="it needs `merge_method:` and `models:`")
    name = document["merge_method"]
    if name not in _METHODS:
        raise ConfigError(
            f"merge_method {name!r} has no counterpart", where="merge_method", hint=f"one of {', '.join(_METHODS)}"
        )
    if document.get("slices") or not isinstance(document.get("models"), list) or not document["models"]:
        raise ConfigError(
            "puts a model together from slices of layers, which no recipe does"
            if document.get("slices")
            else "no models",
            where="slices" if document.get("slices") else "models",
            hint="merge whole models: `models:`",
        )
    _require_finite(document, "")
    return _Conversion(document, _METHODS[name]).result()


def _require_finite(node: Any, where: str) -> None:
    if isinstance(node, float) and not math.isfinite(node):
        raise ConfigError(f"Input should be a finite number, not {node}", where=where)
    if isinstance(node, dict):
        for key, value in node.items():
            _require_finite(value, f"{where}.{key}".removeprefix("."))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            _require_finite(value, f"{where}[{number}]")


class _Conversion:
    def __init__(self, document: Mapping[str, Any], kind: _Kind) -> None:
        self.document, self.kind = document, kind
        self.lost: list[str] = []
        self.notes: list[str] = []
        self.shared = self._mapping(document.get("parameters"), "parameters")

    def result(self) -> Imported:
        base = self._reference(self.document.get("base_model"), "base_model")[0]
        entries = self._entries(base)
        recipe: dict[str, Any] = {"method": self.kind.method, **self.kind.fixed}
        if base is not None:
            recipe["base"] = base
        recipe |= self._parameters([own for _, _, own in entries])
        weights, scale = self._weights([(key, own) for key, _, own in entries])
        factor = self._number("lambda", self.shared, 1.0) if "lambda" in self.kind.keys else 1.0
        if scale * factor != 1.0:
            recipe["scale"] = scale * factor
        recipe["models"] = {
            key: {"path": path} | ({} if weight == 1.0 else {"weight": weight})
            for (key, path, _), weight in zip(entries, weights, strict=True)
        }
        self._rest(recipe, [own for _, _, own in entries])
        return Imported(recipe, tuple(dict.fromkeys(self.lost)), tuple(dict.fromkeys(self.notes)))

    def _entries(self, base: str | None) -> list[tuple[str, str, Mapping[str, Any]]]:
        entries: list[tuple[str, str, Mapping[str, Any]]] = []
        for number, entry in enumerate(self.document["models"]):
            where = f"models[{number}]"
            entry = entry if isinstance(entry, dict) else {"model": entry}
            path, whole = self._reference(entry.get("model"), where)
            if path is None:
                raise ConfigError("names no model", where=where, hint="model: path/to/model")
            if whole is not None and whole != base:
                self.lost.append(f"{where}: an adapter of {whole}, not of the base_model")
            self.lost += [f"{where}.{key}" for key in sorted(entry.keys() - {"model", "parameters"})]
            # The base among the models has no task vector; a plain mean counts it like the others.
            if path == base and self.kind.method not in ("linear", "slerp"):
                continue
            own = self._mapping(entry.get("parameters"), f"{where}.parameters")
            entries.append((_label(path, [key for key, _, _ in entries]), path, own))
        if self.kind.method == "slerp":
            if base is not None and base not in [path for _, path, _ in entries]:
                entries.insert(0, (_label(base, [key for key, _, _ in entries]), base, {}))
            entries.sort(key=lambda entry: entry[1] != base)
        return entries

    def _reference(self, value: Any, where: str) -> tuple[str | None, str | None]:
        """A model's path, and for an adapter the model it belongs to."""
        if value is None:
            return None, None
        if isinstance(value, dict):
            inner, lora = value.get("model", {}), value.get("lora")
            path = inner.get("path") if isinstance(inner, dict) else inner
            revision = inner.get("revision") if isinstance(inner, dict) else None
            lora = lora.get("path") if isinstance(lora, dict) else lora
        else:
            path, _, lora = str(value).partition("+")
            path, _, revision = path.partition("@")
        if revision:
            self.lost.append(f"{where}: revision {revision} (a recipe names directories: fetch that revision)")
        if not lora:
            return (str(path) if path else None), None
        return str(lora), str(path)

    def _mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ConfigError(f"is no mapping: {value!r}", where=where)
        return value

    def _number(self, key: str, among: Mapping[str, Any], default: Any) -> Any:
        """A scalar parameter; gradients and values by tensor are lost, and the default stands in."""
        value = among.get(key, default)
        if isinstance(value, list | dict):
            self.lost.append(f"{key}: a value by layer or by tensor ({value!r:.60})")
            return default
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{key} is no number: {value!r}", where="parameters")
        return value

    def _same(self, key: str, models: Sequence[Mapping[str, Any]]) -> Any:
        """A parameter that mergekit takes by model and a recipe by method."""
        values = [self._number(key, {**self.shared, **own}, _DEFAULTS.get(key)) for own in models]
        if len(set(values)) > 1:
            self.lost.append(f"{key}: another value for every model ({', '.join(map(str, values))})")
        return values[0] if values else _DEFAULTS.get(key)

    def _parameters(self, models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        method, found = self.kind.method, dict[str, Any]()
        if method == "linear":
            found["normalize"] = bool(self.shared.get("normalize", True))
        elif method == "ties":
            found["density"] = self._same("density", models)
        elif method in ("dare", "della"):
            found["drop_rate"] = round(1 - self._same("density", models), 12)
            found["rescale"] = bool(self.shared.get("rescale", True))
            self.notes.append(
                f"{method} draws at random: the masks are others than mergekit's, and the same every time"
            )
        if method == "della":
            # Theirs is half the width of the range of rates, ours the whole.
            found["epsilon"] = round(2 * self._same("epsilon", models), 12)
        elif method == "breadcrumbs":
            found |= {"density": self._same("density", models), "gamma": self._same("gamma", models)}
        elif method == "slerp":
            found["t"] = self._number("t", self.shared, 0.5)
            if "t" not in self.shared:
                self.lost.append("t: not given at the top")
        return found

    def _weights(self, models: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[float], float]:
        """The experts' weights, and by what the whole is to be scaled."""
        count = len(models)
        if self.kind.method in ("slerp", "model_stock"):
            return [1.0] * count, 1.0
        weights = []
        for key, own in models:
            if "weight" not in own and "weight" not in self.shared:
                raise ConfigError(f"{key} has no weight", where="models", hint="parameters: {weight: 1.0}")
            weights.append(float(self._number("weight", {**self.shared, **own}, 1.0)))
        if self.kind.method == "linear":
            return weights, 1.0
        normalize = bool(self.shared.get("normalize", self.kind.normalize))
        if not self.kind.elects:
            total = sum(weights)
            return ([weight / total for weight in weights], 1.0) if normalize and total else (weights, 1.0)
        if len(set(weights)) > 1 or min(weights, default=1.0) <= 0:
            self.lost.append("weight: mergekit lets weights vote on the sign, here they scale what was elected")
            return weights, 1.0
        if normalize:
            return [1.0] * count, 1.0
        if self.kind.method == "ties":
            # The sum of those who agree: the sum over all models divided by their number, times that number.
            return weights, float(count)
        self.lost.append("normalize: false (the sum of those who agree; here it is their mean)")
        return weights, 1.0

    def _rest(self, recipe: dict[str, Any], models: Sequence[Mapping[str, Any]]) -> None:
        document = self.document
        if self.kind.method == "ties" and not bool(self.shared.get("normalize", self.kind.normalize)):
            recipe["disjoint_mean"] = False
        if self.kind.method in ("ties", "breadcrumbs") and self.shared.get("rescale"):
            self.lost.append("rescale: true")
        read = self.kind.keys | {"weight", "normalize", "int8_mask", "rescale"}
        for among in (self.shared, *models):
            self.lost += [f"parameters.{key}" for key in sorted(among.keys() - read) if among[key] is not False]
        dtype = document.get("out_dtype") or document.get("dtype")
        if dtype in _DTYPES:
            recipe["output"] = {"dtype": dtype}
        elif dtype is not None:
            self.lost.append(f"dtype: {dtype}")
        if document.get("dtype") and document["dtype"] != "float32":
            self.notes.append(f"mergekit computes in {document['dtype']}; here it is float32 or float64")
        if document.get("tokenizer_source") not in (None, "base"):
            self.lost.append(f"tokenizer_source: {document['tokenizer_source']} (the base's is taken)")
        self.lost += [f"{key}" for key in sorted(document.keys() - _TOP) if document[key]]


def _label(path: str, taken: Sequence[str]) -> str:
    """A recipe's name for the model in a path."""
    stem = re.sub(r"[^a-z0-9_-]+", "-", path.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-_")[:56] or "model"
    label, number = stem, 2
    while label in taken:
        label, number = f"{stem}-{number}", number + 1
    return label
