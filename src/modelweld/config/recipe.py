"""A recipe: which experts are merged into which base, by which method, written how.

The `merge:` section of params.yaml is a recipe whose paths are filled in by the pipeline; a file of its own names them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, create_model
from pydantic_core import CoreSchema

from modelweld.config.addresses import below
from modelweld.config.align import Align
from modelweld.config.methods import MethodParameters
from modelweld.config.plugins import parameter_kinds
from modelweld.config.strict import Strict

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]


class ExpertEntry(Strict):
    """One model to merge. `path` is required in a recipe file and filled in by the pipeline elsewhere."""

    path: str | None = None
    weight: float = 1.0
    task: str | None = None


class Selector(Strict):
    """Which tensors a rule is for: all conditions that are given must hold."""

    name: str | None = Field(None, description="glob over the tensor's name, e.g. '*.attention.*.weight'")
    layers: tuple[int, int] | None = Field(None, description="inclusive range of layer indices")
    ndim: int | None = None


class _OneOf:
    """The union of the models that `kinds` returns, told apart by `method`.

    It is put together when it is first used and not when this module is imported: the methods that installed packages
    bring belong to it, and loading these loads torch.
    """

    def __init__(self, kinds: Callable[[], tuple[type[Strict], ...]]) -> None:
        self._kinds = kinds

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        union: Any = Annotated[Union[self._kinds()], Field(discriminator="method")]  # noqa: UP007
        return handler.generate_schema(union)


AnyMethod = Annotated[MethodParameters, _OneOf(parameter_kinds)]


class Rule(Strict):
    """The first rule whose selector matches a tensor decides how it is merged."""

    model_config = ConfigDict(defer_build=True)

    match: Selector
    use: AnyMethod | Literal["base", "skip"]


class Output(Strict):
    """How the merged weights are written."""

    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    shard_bytes: Annotated[int, Field(ge=1_000_000)] = 2_000_000_000
    adapter: Literal["fold", "keep"] = Field(
        "fold", description="merged LoRA adapters go into the base, or (keep) stay an adapter that PEFT loads"
    )


class Recipe(Strict):
    """What every recipe holds, whatever its method; `load_recipe` returns the subclass of the named method."""

    model_config = ConfigDict(defer_build=True)

    base: str | None = None
    models: dict[Name, ExpertEntry] | None = None
    rules: tuple[Rule, ...] = ()
    others: AnyMethod | None = Field(
        None, description="method for tensors that the main method does not take (biases, norms, embeddings under drm)"
    )
    align: Align | None = Field(
        None, description="bring the experts' units to one order first; method mudsc does so in any case"
    )
    output: Output = Output()

    @property
    def alignment(self) -> Align | None:
        """How the experts are aligned before they are merged; None when they are not."""
        aligns = isinstance(self, MethodParameters) and self.aligns
        return Align() if self.align is None and aligns else self.align

    def parameters(self) -> MethodParameters:
        """The method's own parameters, without the rest of the recipe."""
        kind = next(k for k in parameter_kinds() if isinstance(self, k))
        return kind.model_validate({name: getattr(self, name) for name in kind.model_fields})

    def rooted(self, root: Path) -> Self:
        """The same recipe with its relative paths taken from `root`; absolute ones and addresses stay."""
        models = self.models and {
            name: entry.model_copy(update={"path": entry.path and below(root, entry.path)})
            for name, entry in self.models.items()
        }
        base, align = self.base and below(root, self.base), self.align and self.align.rooted(root)
        return self.model_copy(update={"base": base, "models": models, "align": align})

    @property
    def method_name(self) -> str:
        """The method that tensors get unless a rule says otherwise."""
        return self.parameters().method


def _recipe_of(kind: type[MethodParameters]) -> type[Recipe]:
    method = kind.model_fields["method"].default
    bases: Any = (kind, Recipe)
    required: Any = (Literal[method], ...)
    build: Any = create_model
    model: type[Recipe] = build(f"{kind.__name__}Recipe", __base__=bases, __doc__=kind.__doc__, method=required)
    return model


@functools.cache
def _recipe_kinds() -> tuple[type[Recipe], ...]:
    return tuple(_recipe_of(kind) for kind in parameter_kinds())


AnyRecipe: Any = Annotated[Any, _OneOf(_recipe_kinds)]
RECIPE_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(AnyRecipe, config=ConfigDict(defer_build=True))
