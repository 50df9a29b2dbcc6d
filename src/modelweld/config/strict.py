"""The base of every section of params.yaml and of a recipe."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

BOOLEAN = "boolean_forbidden"


class Strict(BaseModel):
    """Frozen; refuses unknown keys, numbers that are not finite, and true or false where a key takes neither."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_stray_booleans(cls, values: Any) -> Any:
        # pydantic takes true for 1.0: `weight: true` would merge where the author meant something else.
        if isinstance(values, dict):
            for key in (key for key, value in values.items() if _holds_boolean(value)):
                if key in cls.model_fields and not _takes_boolean(cls, key):
                    raise PydanticCustomError(BOOLEAN, "takes neither true nor false", {"key": key})
        return values


def _holds_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_boolean, value)))


@cache
def _takes_boolean(kind: type[BaseModel], field: str) -> bool:
    pending: list[Any] = [kind.model_fields[field].annotation]
    while pending:
        annotation = pending.pop()
        if annotation is bool or annotation is Any:
            return True
        pending.extend(get_args(annotation))
    return False
