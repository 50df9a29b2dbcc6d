"""Which method a tensor gets: the recipe's rules first, then the defaults that stand in this file.

Defaults, in order: integers and bools, then buffers, are the base's (but for the batch statistics of aligned models,
which are averaged); a method that takes whole matrices (DRM) takes the 2-D weights of linear layers, and everything
else (embeddings, norms, biases, convolutions) goes to the recipe's `others`, by default TIES' sign election and
disjoint mean with nothing trimmed and the recipe's own scale; any other method takes every trained tensor. Heads are
kept, one per task.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from modelweld.checkpoints import TensorInfo
from modelweld.config import Recipe, Selector
from modelweld.config.methods import Average, Linear, MethodParameters, Ties
from modelweld.engine.plan.records import Role
from modelweld.engine.plan.roles import layer_of
from modelweld.errors import ConfigError
from modelweld.methods.method import Method
from modelweld.methods.registry import method

STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Decision:
    """What happens to a tensor, by which parameters, and why."""

    action: Literal["merge", "copy", "skip"]
    parameters: MethodParameters | None
    reason: str


def decide(recipe: Recipe, info: TensorInfo, role: Role) -> Decision:
    """The first matching rule, or the default for this role.

    Raises ConfigError when a rule gives a tensor to a method that cannot take it.
    """
    empty = Decision("copy", None, "it holds no numbers") if 0 in info.shape else None
    for number, rule in enumerate(recipe.rules, 1):
        if _matches(rule.match, info):
            because = f"rule {number}"
            if rule.use == "skip":
                return Decision("skip", None, because)
            if rule.use == "base":
                return Decision("copy", None, because)
            if empty is not None:
                return empty
            parameters: MethodParameters = rule.use
            _can_take(method(parameters.method), info, role, because)
            return Decision("merge", parameters, because)
    if empty is not None:
        return empty
    if role == "integer":
        return Decision("copy", None, f"{str(info.dtype).removeprefix('torch.')} is never averaged")
    if role == "buffer" and recipe.alignment is not None and info.name.endswith(STATISTICS):
        # They belong to channels, and channels have moved: the base's would be those of other ones.
        weighted = len({entry.weight for entry in (recipe.models or {}).values()}) > 1
        mean = Linear() if weighted else Average()
        return Decision("merge", mean, "batch statistics of aligned channels")
    if role == "buffer":
        return Decision("copy", None, "a buffer, not a trained weight")
    main = recipe.parameters()
    if method(main.method).whole_matrix and not (role == "linear" and len(info.shape) == 2):
        others = recipe.others or Ties(density=1.0, scale=main.scale)
        article = "an" if role[0] in "aeio" else "a"
        return Decision("merge", others, f"{article} {role}, which {main.method} does not take")
    return Decision("merge", main, f"{role}: the recipe's method")


def _can_take(chosen: Method[Any], info: TensorInfo, role: Role, because: str) -> None:
    if role == "integer":
        raise ConfigError(
            f"{because} gives {info.name} to {chosen.name}, but {info.dtype} cannot be merged",
            where="rules",
            hint="let the rule say `use: base`",
        )
    if chosen.whole_matrix and len(info.shape) != 2:
        raise ConfigError(
            f"{because} gives {info.name} to {chosen.name}, which takes matrices, not shape {list(info.shape)}",
            where="rules",
            hint="add `ndim: 2` to the rule's match",
        )


def _matches(selector: Selector, info: TensorInfo) -> bool:
    if selector.name is not None and not fnmatchcase(info.name, selector.name):
        return False
    if selector.ndim is not None and len(info.shape) != selector.ndim:
        return False
    if selector.layers is not None:
        layer = layer_of(info.name)
        return layer is not None and selector.layers[0] <= layer <= selector.layers[1]
    return True
