"""params.yaml and recipe files as frozen models, with errors that quote the user's keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from modelweld.config.addresses import expanded
from modelweld.config.explaining import explain
from modelweld.config.params import Params
from modelweld.config.reading import read_yaml
from modelweld.config.recipe import RECIPE_ADAPTER, Recipe
from modelweld.errors import ConfigError

T = TypeVar("T")


def load_params(path: Path = Path("params.yaml")) -> Params:
    """params.yaml, checked; raises ConfigError naming every wrong key."""
    path = expanded(str(path))
    return _checked(_mapping_in(path), Params.model_validate, str(path))


def load_recipe(path: Path) -> Recipe:
    """A recipe file; relative paths in it are taken from the recipe's own folder.

    >>> text = "{method: average, models: {a: {path: experts/a}, b: {path: /models/b, weight: 0.5}}}"
    >>> _ = Path("recipe.yaml").write_text(text)
    >>> recipe = load_recipe(Path("recipe.yaml"))
    >>> recipe.method_name, [(entry.path, entry.weight) for entry in recipe.models.values()]
    ('average', [('experts/a', 1.0), ('/models/b', 0.5)])

    Raises ConfigError naming every wrong key, and for models without a path.
    """
    path = expanded(str(path))
    return _complete(_mapping_in(path), path)


def load_recipe_or_params(path: Path) -> Recipe:
    """The recipe in a file: a recipe file's own, or the `merge:` of a params.yaml whose models are fetched.

    Raises ConfigError also where a model of params.yaml is not there yet.
    """
    document = _mapping_in(path)
    if not _is_params(document):
        return _complete(document, path)
    params: Params = _checked(document, Params.model_validate, str(path))
    recipe = params.recipe().rooted(path.parent)
    paths = [str(entry.path) for entry in (recipe.models or {}).values()]
    missing = [model for model in paths if not Path(model).exists()]
    if missing:
        raise ConfigError(
            f"{len(missing)} models are not here yet, first {missing[0]}",
            where=str(path),
            hint="fetch them: `modelweld pin`, then `dvc repro fetch`",
        )
    return recipe


def is_params(path: Path) -> bool:
    """Whether a file is a params.yaml, not a recipe file; raises ConfigError for what is neither."""
    return _is_params(_mapping_in(path))


def check_recipe(document: Any, *, where: str, root: str = "") -> Recipe:
    """A recipe from plain values; raises ConfigError that names every wrong key below `root`."""
    return _checked(document, RECIPE_ADAPTER.validate_python, where, root)


def _complete(document: dict[str, Any], path: Path) -> Recipe:
    recipe = check_recipe(document, where=str(path))
    if not recipe.models:
        raise ConfigError("a recipe file needs `models:`", where=str(path), hint="models: {sst2: {path: …}}")
    missing = [name for name, entry in recipe.models.items() if entry.path is None]
    if missing:
        raise ConfigError(f"models without a path: {', '.join(missing)}", where=str(path), hint="give each one `path:`")
    return recipe.rooted(path.parent)


def _is_params(document: dict[str, Any]) -> bool:
    return "merge" in document


def _mapping_in(path: Path) -> dict[str, Any]:
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=str(path), hint="`modelweld init` writes a first one") from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", where=str(path)) from error
    except ValueError as error:
        raise ConfigError(str(error), where=str(path)) from error
    if not isinstance(document, dict):
        raise ConfigError("the file must hold a mapping", where=str(path), hint="`modelweld schema` prints its shape")
    return document


def _checked(document: Any, validate: Callable[[Any], T], where: str, root: str = "") -> T:
    try:
        return validate(document)
    except ValidationError as error:
        what = explain(error, document, sorted(_known_keys()), root=root)
        raise ConfigError(what, where=where, hint="`modelweld schema` prints every key") from error


def _known_keys() -> set[str]:
    keys: set[str] = set()
    pending: list[Any] = [json_schema(), json_schema("recipe")]
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
