"""Markdown tables of JSON Schemas as pydantic writes them: one section per model, one row per key."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def section(name: str, schema: Schema, *, level: int = 2) -> str:
    """The heading, the description and the table of one model."""
    parts = [f"{'#' * level} {name}", prose(schema.get("description", "")), key_table(schema)]
    return "\n\n".join(part for part in parts if part) + "\n"


def key_table(schema: Schema, *, without: frozenset[str] = frozenset()) -> str:
    """One row per key of an object: its type, its default and what it means."""
    required = schema.get("required", ())
    rows = [
        _row(f"`{key}`", type_of(value), "required" if key in required else default_of(value), meaning_of(value))
        for key, value in schema.get("properties", {}).items()
        if key not in without
    ]
    if not rows:
        return ""
    return "\n".join([_row("key", "type", "default", "meaning"), _row(*["---"] * 4), *rows])


def common_keys(variants: list[Schema]) -> dict[str, Any]:
    """What every variant of a union takes, as an object schema; raises ValueError without variants."""
    first, *others = variants
    shared = {
        key: value
        for key, value in first["properties"].items()
        if all(other["properties"].get(key) == value for other in others)
    }
    return {"properties": shared, "required": [key for key in first.get("required", ()) if key in shared]}


def variants_of(union: Schema, definitions: Mapping[str, Any]) -> dict[str, Schema]:
    """The models of a discriminated union by the value that chooses them."""
    return {value: definitions[_name(target)] for value, target in union["discriminator"]["mapping"].items()}


def type_of(value: Schema) -> str:
    """The type of one key in words, with links to the sections of other models."""
    return " or ".join(dict.fromkeys(_alternatives(value)))


def default_of(value: Schema) -> str:
    """The default as it would be written in YAML, or nothing where the key has none."""
    return f"`{json.dumps(value['default'], ensure_ascii=False)}`" if "default" in value else ""


def meaning_of(value: Schema) -> str:
    """The description and the bounds."""
    bounds = ", ".join(dict.fromkeys(_bounds(value)))
    description = prose(" ".join(value.get("description", "").split()))
    return "; ".join(part for part in (description, bounds) if part)


def prose(text: str) -> str:
    """The text as Markdown that shows `<name>` instead of taking it for an HTML tag; code stays as it is."""
    parts = text.split("`")
    return "`".join(part if number % 2 else html.escape(part, quote=False) for number, part in enumerate(parts))


def _alternatives(value: Schema) -> Iterator[str]:
    if "$ref" in value:
        name = _name(value["$ref"])
        yield f"[{name}](#{name.lower()})"
    elif "discriminator" in value:
        yield f"one form per `{value['discriminator']['propertyName']}`"
    elif "anyOf" in value or "oneOf" in value or "allOf" in value:
        for one in value.get("anyOf") or value.get("oneOf") or value["allOf"]:
            yield from _alternatives(one)
    elif "enum" in value or "const" in value:
        yield from (f"`{json.dumps(one)}`" for one in value.get("enum", [value.get("const")]))
    else:
        yield _container(value)


def _container(value: Schema) -> str:
    kind = value.get("type")
    if kind == "array" and "prefixItems" in value:
        return "list of " + ", ".join(type_of(item) for item in value["prefixItems"])
    if kind == "array":
        return f"list of {type_of(value.get('items', {}))}"
    if kind == "object" and "properties" not in value:
        inner = [*value.get("patternProperties", {}).values()] or [value.get("additionalProperties")]
        return f"mapping of names to {type_of(inner[0])}" if isinstance(inner[0], Mapping) else "mapping"
    return kind if isinstance(kind, str) else "anything"


def _bounds(value: Schema) -> Iterator[str]:
    yield from (f"{sign} {value[key]}" for key, sign in _BOUNDS.items() if key in value)
    for one in value.get("anyOf", ()):
        yield from _bounds(one)


def _name(reference: str) -> str:
    return reference.rsplit("/", 1)[-1]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
