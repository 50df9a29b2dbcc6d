"""Reading YAML into the frozen models, with errors that quote the key and suggest the one that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from modelweld.config.align import Align, Rows
from modelweld.config.methods import METHODS
from modelweld.config.params import Params
from modelweld.config.recipe import RECIPE_ADAPTER, Recipe
from modelweld.errors import ConfigError

T = TypeVar("T")


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key may stand once: of two models under one name the first would vanish unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_params(path: Path = Path("params.yaml")) -> Params:
    """params.yaml, checked; raises ConfigError naming every wrong key."""
    return _load(path, Params.model_validate)


def load_recipe(path: Path) -> Recipe:
    """A recipe file; relative paths in it are taken from the recipe's own folder."""
    recipe = _load(path, RECIPE_ADAPTER.validate_python)
    if not recipe.models:
        raise ConfigError("a recipe file needs `models:`", where=str(path), hint="models: {sst2: {path: …}}")
    missing = [name for name, entry in recipe.models.items() if entry.path is None]
    if missing:
        raise ConfigError(f"models without a path: {', '.join(missing)}", where=str(path), hint="give each one `path:`")
    root = path.parent
    models = {k: v.model_copy(update={"path": str(root / str(v.path))}) for k, v in recipe.models.items()}
    base = str(root / recipe.base) if recipe.base else None
    align = rooted(recipe.align, root)
    return recipe.model_copy(update={"base": base, "models": models, "align": align})


def rooted(align: Align | None, root: Path) -> Align | None:
    """The same settings with every path below `root`, unless it is absolute or on the Hub."""
    if align is None:
        return None

    def below(path: str) -> str:
        return path if "://" in path else str(root / path)

    def rows(given: dict[str, Rows] | None) -> dict[str, Rows] | None:
        if given is None:
            return None
        return {name: entry.model_copy(update={"dataset": below(entry.dataset)}) for name, entry in given.items()}

    return align.model_copy(
        update={
            "spec": below(align.spec) if align.spec else None,
            "calibration": rows(align.calibration),
            "validation": rows(align.validation),
        }
    )


def _load(path: Path, validate: Callable[[Any], T]) -> T:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # noqa: S506 - a SafeLoader
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=str(path), hint="`modelweld init` writes a first one") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not valid YAML: {error}", where=str(path)) from error
    if not isinstance(raw, dict):
        raise ConfigError("the file must hold a mapping", where=str(path), hint="`modelweld schema` prints its shape")
    try:
        return validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error), where=str(path), hint="`modelweld schema` prints every key") from error


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        loc = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"unknown key{_did_you_mean(str(item['loc'][-1]))}"
        elif item["type"] == "union_tag_invalid":
            message = f"unknown method {item['ctx']['tag']!r}{_did_you_mean(str(item['ctx']['tag']), _method_names())}"
        lines.append(f"{loc}: {message}" if loc else message)
    return "; ".join(lines)


def _method_names() -> list[str]:
    return [kind.model_fields["method"].default for kind in METHODS]


def _did_you_mean(word: str, among: list[str] | None = None) -> str:
    close = difflib.get_close_matches(word.strip("'"), among or sorted(_known_keys()), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _known_keys() -> set[str]:
    keys: set[str] = set()
    pending: list[Any] = [json_schema()]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            keys.update(node.get("properties", {}))
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)
    return keys


def json_schema(kind: str = "params") -> dict[str, Any]:
    """JSON Schema of params.yaml (`params`) or of a recipe file (`recipe`)."""
    adapter: TypeAdapter[Any] = TypeAdapter(Params) if kind == "params" else RECIPE_ADAPTER
    return adapter.json_schema()
