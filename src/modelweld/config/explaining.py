"""What pydantic found wrong, in terms of the keys and values that the user wrote."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from modelweld.config.plugins import parameter_kinds
from modelweld.config.recipe import NAME_PATTERN
from modelweld.config.strict import BOOLEAN

_SHOWN = 60


@dataclass(frozen=True)
class _Finding:
    place: str
    kind: str
    message: str
    value: Any


def explain(error: ValidationError, document: Any, known: Sequence[str], *, root: str = "") -> str:
    """One clause per mistake: the key's full path in `document`, below `root`, and what is wrong there.

    `known` are the keys that exist; a mistyped one is compared with them.
    """
    findings = [_finding(item, document, known) for item in error.errors(include_url=False)]
    lines = []
    for finding in _without_other_branches(findings):
        place = ".".join(part for part in (root, finding.place) if part)
        lines.append(f"{place}: {finding.message}" if place else finding.message)
    return "; ".join(dict.fromkeys(lines))


def _finding(item: Any, document: Any, known: Sequence[str]) -> _Finding:
    kind, value = item["type"], item.get("input")
    loc = (*item["loc"], item["ctx"]["key"]) if kind == BOOLEAN else item["loc"]
    place = _place(loc, document, known)
    return _Finding(place, kind, _message(kind, item, known), value)


def _message(kind: str, item: Any, known: Sequence[str]) -> str:
    value, context = item.get("input"), item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{_did_you_mean(str(item['loc'][-1]), known)}"
    if kind == "union_tag_invalid":
        methods = [method.model_fields["method"].default for method in parameter_kinds()]
        return f"unknown method {context['tag']!r}{_did_you_mean(context['tag'], methods)}"
    if kind == "union_tag_not_found":
        return "needs `method:`"
    if kind == "missing":
        return "is missing"
    if kind == "finite_number":
        return f"Input should be a finite number, not {value}"
    if kind == "string_pattern_mismatch" and context.get("pattern") == NAME_PATTERN:
        return f"{_shown(value)} is no name: use lowercase letters, digits, - and _, a letter or digit first"
    if kind == "string_type" and isinstance(value, int | float):
        return f"Input should be a valid string: write it in quotes, '{value}'"
    message = str(item["msg"]).removeprefix("Value error, ").partition(", unable to")[0]
    return f"{message}, not {_shown(value)}" if _is_scalar(value) and kind != "value_error" else message


def _place(loc: Sequence[int | str], document: Any, known: Sequence[str]) -> str:
    """The path of a mistake by the user's own keys: pydantic's also names the members of unions that it tried."""
    node, place, tagged = document, "", False
    for part in loc:
        if isinstance(node, Mapping) and not tagged and part == node.get("method"):
            tagged = True
        elif isinstance(node, Mapping) and part in node:
            node, place, tagged = node[part], f"{place}.{part}", False
        elif isinstance(node, list | tuple) and isinstance(part, int) and part < len(node):
            node, place, tagged = node[part], f"{place}[{part}]", False
        elif isinstance(node, list | tuple) and isinstance(part, int):
            node, place, tagged = None, f"{place}[{part}]", False
        elif part in known:
            node, place, tagged = None, f"{place}.{part}", False
    return place.removeprefix(".")


def _without_other_branches(findings: Sequence[_Finding]) -> list[_Finding]:
    """Of a key that takes a word or something else, only what is wrong with the one that was written."""

    kept = []
    for finding in findings:
        others = [other for other in findings if other is not finding]
        same_key = {other.kind for other in others if other.place == finding.place}
        is_word = isinstance(finding.value, str)
        if finding.kind != "literal_error":
            if not (is_word and "literal_error" in same_key and finding.kind != "finite_number"):
                kept.append(finding)
        elif "finite_number" in same_key:
            continue
        elif "float_parsing" in same_key:
            words = finding.message.removeprefix("Input should be ")
            kept.append(replace(finding, message=f"Input should be a number or {words}"))
        elif is_word or not any(other.place.startswith(finding.place) for other in others):
            kept.append(finding)
    return kept


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _did_you_mean(word: str, among: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.strip("'"), among, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
