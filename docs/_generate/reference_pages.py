"""The reference pages that are made from the code: commands, configuration and methods, as Markdown by page address."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from inspect import ismodule
from typing import Any

import schema_tables as tables
import typer.main
from typer.cli import get_docs_for_click

from modelweld import formats, merging
from modelweld.cli.app import COMMANDS, app
from modelweld.config import json_schema
from modelweld.formats import DOCUMENTS
from modelweld.methods.method import Method
from modelweld.methods.registry import methods

_NESTED = "{heading_level: 3}"
# The keys of a method that stand on the page of recipes already.
_IN_EVERY_METHOD = frozenset({"method", "scale"})


def pages() -> Iterator[tuple[str, str]]:
    """The address and the content of every generated page."""
    yield "reference/commands.md", commands_page()
    yield "reference/params.md", params_page()
    yield "reference/recipe.md", recipe_page()
    yield "reference/methods.md", methods_page()
    yield "reference/api/merging.md", merging_page()
    for name in DOCUMENTS:
        yield document_address(name), document_page(name)
        yield f"reference/schemas/{name}.json", _json(formats.json_schema(name))
    for kind in ("params", "recipe"):
        yield f"reference/schemas/{kind}.json", _json(json_schema(kind))


def commands_page() -> str:
    """Every command with its arguments and options, as the command line declares them."""
    for module in dict.fromkeys(COMMANDS.values()):
        import_module(f"modelweld.cli.{module}")
    command = typer.main.get_group(app)
    context = typer.Context(command, info_name="modelweld")
    head = (
        "`--json` and `--debug` are taken by every command: the first prints one JSON document, the second shows "
        "tracebacks. Exit codes: 0 done, 1 a check said no, 2 bad input, 3 something outside failed, 130 interrupted."
    )
    sections = [
        tables.prose(get_docs_for_click(obj=part, ctx=context, indent=1, name=name, call_prefix="modelweld"))
        for name, part in command.commands.items()
    ]
    return _page("Commands", command.help or "", head, *sections)


def params_page() -> str:
    """Every key of params.yaml; recipes and methods have pages of their own."""
    schema = json_schema("params")
    sections = [
        tables.section(name, definition) for name, definition in schema["$defs"].items() if name not in _of_recipes()
    ]
    head = (
        "`merge` and each of `baselines` is a [recipe](recipe.md) without `base` and `models`, which the pipeline sets."
    )
    return _page(
        "params.yaml",
        tables.prose(schema["description"]),
        _schema_link("params"),
        tables.key_table(schema),
        head,
        *sections,
    )


def recipe_page() -> str:
    """Every key that all recipes share; what one method takes more is on the page of methods."""
    schema = json_schema("recipe")
    recipes = list(tables.variants_of(schema, schema["$defs"]).values())
    head = (
        "A recipe says which models are merged, and how. Beside the keys of this page it takes `method` and the keys "
        "of that [method](methods.md). Unknown keys are refused."
    )
    sections = [
        tables.section(name, schema["$defs"][name]) for name in sorted(_of_recipes() - _of_methods() - _recipe_models())
    ]
    shared = tables.key_table(tables.common_keys(recipes))
    return _page("Recipe files", head, _schema_link("recipe"), shared, *sections)


def document_address(name: str) -> str:
    """Where the page of one document is."""
    return f"reference/documents/{name}.md"


def document_page(name: str) -> str:
    """Every key of a document that modelweld writes."""
    schema = formats.json_schema(name)
    link = (
        f"As JSON Schema, for auditors: [{name}.json](../schemas/{name}.json), or "
        f"`modelweld schema --document {name}`. In Python: `modelweld.formats.{DOCUMENTS[name].__name__}`."
    )
    sections = [tables.section(part, definition) for part, definition in schema.get("$defs", {}).items()]
    return _page(name, tables.prose(schema.get("description", "")), link, tables.key_table(schema), *sections)


def methods_page() -> str:
    """Every method of the table: what it does, what it needs, which keys it takes."""
    head = (
        "Every method also takes `scale` (default `1.0`), which multiplies the merged delta or, in a method that works "
        "on weights, the merged weight. `modelweld.merging` has each of them as a function on tensors "
        "([reference](api/merging.md))."
    )
    names = ", ".join(f"[`{name}`](#{name})" for name in methods())
    return _page("Methods", names, head, *map(_method_section, methods().values()))


def merging_page() -> str:
    """The reference of `modelweld.merging`: the package, then everything that it exports."""
    head = "::: modelweld.merging\n    options: {members: false}"
    sections = [f"## `merging.{name}`\n\n::: {_defined_at(name)}\n    options: {_NESTED}" for name in merging.__all__]
    return _page("modelweld.merging", head, *sections)


def _defined_at(name: str) -> str:
    exported = getattr(merging, name)
    return exported.__name__ if ismodule(exported) else f"{exported.__module__}.{exported.__qualname__}"


def _method_section(method: Method[Any]) -> str:
    schema = method.parameters.model_json_schema()
    facts = " ".join(_facts(method))
    keys = tables.key_table(schema, without=_IN_EVERY_METHOD) or "No keys of its own."
    return _page(
        f"`{method.name}` {{ #{method.name} }}", _with_links(tables.prose(schema["description"])), facts, keys, level=2
    )


def _facts(method: Method[Any]) -> Iterator[str]:
    yield "Merges task vectors: needs a base." if method.needs_base else "Merges weights: needs no base."
    yield f"Models: {_count(*method.models)}."
    if method.elementwise:
        yield "Looks at one entry at a time, so any chunk of a tensor can be merged alone."
    elif method.whole_matrix:
        yield "Merges matrices; every other tensor gets the recipe's `others` (by default TIES without trimming)."
    else:
        yield "Looks at a whole tensor of any shape."
    if method.low_rank:
        yield "Merges LoRA adapters in their factors."


def _count(least: int, most: int | None) -> str:
    if most is None:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"


def _of_recipes() -> frozenset[str]:
    return frozenset(json_schema("recipe")["$defs"])


def _of_methods() -> frozenset[str]:
    return frozenset(method.parameters.__name__ for method in methods().values())


def _recipe_models() -> frozenset[str]:
    mapping = json_schema("recipe")["discriminator"]["mapping"]
    return frozenset(target.rsplit("/", 1)[-1] for target in mapping.values())


def _json(schema: object) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _schema_link(kind: str) -> str:
    return f"As JSON Schema, for editors: [{kind}.json](schemas/{kind}.json), or `modelweld schema {kind}`."


def _with_links(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _page(title: str, *parts: str, level: int = 1) -> str:
    return "\n\n".join([f"{'#' * level} {title}", *(part for part in parts if part)]) + "\n"
