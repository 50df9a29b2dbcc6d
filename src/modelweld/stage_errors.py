"""How a stage's error reaches the process that started it: as JSON in a file that the environment names.

The process that starts a stage sets MODELWELD_ERROR_FILE; the `modelweld` command writes the error it ends with there.
The exit code alone says as much as a shell needs, the file adds the error's type, its place and its hint.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelweld import settings
from modelweld.errors import ModelweldError

SCHEMA = "modelweld.stage_error/1"


def write(error: BaseException) -> None:
    """Write `error` to the file that MODELWELD_ERROR_FILE names; do nothing where it names none.

    An error that modelweld did not raise on purpose is a defect: it is written as a ModelweldError that says so.
    """
    path = settings.error_file()
    if path is None:
        return
    if not isinstance(error, ModelweldError):
        last = "".join(traceback.format_exception_only(error)).strip()
        error = ModelweldError(f"crashed: {last}", hint="this is a defect of the stage; please report it")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"schema": SCHEMA, **to_plain(error)}), encoding="utf-8")
    draft.replace(path)


def read(path: Path) -> ModelweldError | None:
    """The error that a stage wrote to `path`; None when it wrote none that this version understands.

    A stage that a signal ended writes nothing: its exit code has to do.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return None
    try:
        return from_plain(document)
    except KeyError:
        return None


def to_plain(error: ModelweldError) -> dict[str, str | None]:
    """The error as plain data: `error` (its type's name), `what`, `where` and `hint`. `from_plain` is the inverse."""
    return {"error": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}


def from_plain(document: Mapping[str, Any]) -> ModelweldError:
    """The error that `to_plain` described; KeyError for a type that this version does not have."""
    every: list[type[ModelweldError]] = [ModelweldError, *_subclasses(ModelweldError)]
    kinds = {kind.__name__: kind for kind in every}
    return kinds[document["error"]](document["what"], where=document["where"], hint=document["hint"])


def _subclasses(kind: type[ModelweldError]) -> Iterator[type[ModelweldError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
