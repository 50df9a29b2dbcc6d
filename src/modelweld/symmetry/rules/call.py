"""What a rule is given, and the table that rules register themselves in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from modelweld.symmetry.atoms import Axes, Axis, UnsupportedOp, freeze, fresh

Result = Axes | tuple[Axes, ...]
Rule = Callable[["Call"], Result]

# By the operation's name.
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of these operations."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} has two rules")
            RULES[name] = function
        return function

    return register


@dataclass(frozen=True, eq=False)
class Choice:
    """Positions on an axis, chosen from its values: wherever all atoms of `holders` are, one of them was picked."""

    axis: Axis
    holders: Axis


@dataclass(frozen=True)
class Call:
    """One operation of the graph: its name, its arguments, and the axes of the tensors among them.

    `choices` holds, by node and number of its result, what the numbers in a tensor name; `sums` the axes of what is
    summed up on the way and never seen as a tensor.
    """

    name: str
    node: Node
    env: dict[Node, Result]
    reads: list[tuple[Node, int]]
    choices: dict[tuple[Node, int], Choice]
    sums: list[Axes]

    @property
    def tensors(self) -> list[Node]:
        return [node for node in self.node.all_input_nodes if node in self.env]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def axes(self, node: Any) -> Axes:
        found = self.env[node]
        if isinstance(found, tuple):
            raise UnsupportedOp("a tuple where a tensor was expected")
        return found

    def contracts(self, weight: Any, dim: int) -> None:
        """Note that this axis of an operand takes units in, also where the operand was picked from a stack."""
        while isinstance(weight, Node) and weight.op == "call_function" and name_of(weight) == "index":
            weight, picks = weight.args[0], weight.args[1]
            dim -= sum(len(self.sizes(index)) - 1 for index in picks if isinstance(index, Node))
        if isinstance(weight, Node):
            self.reads.append((weight, dim))

    def choice(self, node: Any) -> Choice | None:
        """What the numbers of a tensor name, if they name anything."""
        return self.choices.get((node, 0)) if isinstance(node, Node) else None

    def first(self) -> Axes:
        return self.axes(self.node.args[0])

    def sizes(self, node: Any) -> list[int]:
        return [int(size) for size in node.meta["val"].shape]

    def out_sizes(self) -> list[int]:
        return self.sizes(self.node)

    def outputs(self) -> list[list[int]]:
        value = self.node.meta["val"]
        return [[int(size) for size in item.shape] for item in value]


def name_of(node: Node) -> str:
    """The operation's name without its namespace and without the mark of what works in place."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("_") else name.rstrip("_")


def unknown(call: Call) -> Result:
    """Pin all that a call touches."""
    why = f"unknown operation {call.name}"
    for node in call.tensors:
        found = call.env[node]
        for axes in found if isinstance(found, tuple) else (found,):
            for axis in axes:
                freeze(axis, why)
    value = call.node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return tuple(fresh([int(s) for s in item.shape], why) for item in value if isinstance(item, torch.Tensor))
    return fresh(call.out_sizes(), why)
