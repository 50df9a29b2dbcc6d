"""Derive a model's permutation symmetries from its exported graph.

The architecture is exported once on the meta device (no weights are needed), the rules in `rules` are followed
through its graph, and what stays free becomes the groups of a `Spec`. Parameters that are one object share their axes.
"""

from __future__ import annotations

import operator
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from modelweld.errors import MergeError
from modelweld.symmetry.atoms import Atom, Axes, Axis, UnsupportedOp, expand, freeze, fresh, leader, settle
from modelweld.symmetry.rules import CARRIES, CHOOSES, RULES, UNIFORM, Call, Choice, Result, name_of, unknown
from modelweld.symmetry.spec import Factor, Group, Spec, join, pieces

_BY_HAND = "give a spec file written by hand (align: {spec: FILE}), or merge by a method that needs no alignment"
SILENT = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_size", "sym_constrain_range_for_size"}


def derive_spec(model: Any, inputs: Mapping[str, Any] | tuple[Any, ...] | None = None) -> Spec:
    """The groups of a module or of a transformers config, with what froze each axis that is not in one.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> derive_spec(model, (torch.zeros(1, 8),)).groups
    {'0.weight[0]': Group(name='0.weight[0]', size=4, within=())}

    `inputs` is an example call (keyword or positional); transformers models get one from their config. Raises
    MergeError when the model cannot be exported, naming why. Source: MuDSC (arXiv 2403.01753) matches over such
    groups; deriving them from the graph is this project's own.
    """
    from modelweld.symmetry.instances import OutputOnly, example_inputs, instantiate

    try:
        module = model if isinstance(model, nn.Module) else instantiate(model)
        call = example_inputs(module) if inputs is None else inputs
    except MergeError:
        raise
    except Exception as error:
        raise MergeError(
            f"cannot be built from its config: {_first_line(error)}", where=type(model).__name__, hint=_BY_HAND
        ) from error
    module = module.eval()
    args, kwargs = (call, {}) if isinstance(call, tuple) else ((), dict(call))
    # torch prints the whole graph of what cannot be exported; one line of the error names the operation.
    with warnings.catch_warnings(), torch.no_grad(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(OutputOnly(module), args, kwargs, strict=False)
        except Exception as error:
            raise MergeError(
                f"cannot be exported: {_first_line(error)}{_culprit(error)}", where=type(module).__name__, hint=_BY_HAND
            ) from error
    return _Derivation(program, module).spec()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _culprit(error: Exception) -> str:
    """The operation of the model itself at which exporting ended, as its source has it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((str(Path(torch.__file__).parent), __file__))]
    own = [frame for frame in own if Path(frame.filename).parent != Path(__file__).parent]
    return f", at `{own[-1].line}` ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


class _Derivation:
    """One walk over one graph."""

    def __init__(self, program: Any, module: nn.Module) -> None:
        self.graph = program.graph_module
        signature = program.graph_signature
        tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(
            module.named_buffers(remove_duplicate=False)
        )
        self.state = {name: tensor for name, tensor in tensors.items() if name in set(module.state_dict())}
        self.tensors = tensors
        inputs = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
        self.sources = {name: target.removeprefix("module.") for name, target in inputs.items()}
        self.buffers = set(signature.inputs_to_buffers)
        self.constants = dict(getattr(signature, "inputs_to_lifted_tensor_constants", {}))
        self.shared: dict[int, Axes] = {}
        self.env: dict[Node, Result] = {}
        self.reads: list[tuple[Node, int]] = []
        self.choices: dict[tuple[Node, int], Choice] = {}
        self.sums: list[Axes] = []
        self.within: dict[int, Atom] = {}
        self.unknown: Counter[str] = Counter()

    def spec(self) -> Spec:
        statistics = set(self._statistics())
        live = self._live()
        for node in self.graph.graph.nodes:
            if node not in live:
                continue
            if node.op == "placeholder":
                self._placeholder(node, statistics)
            elif node.op == "get_attr":
                self._constant(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self._named(source, "output")
                    for axes in self._tuple(self.env.get(source, [])):
                        for axis in axes:
                            freeze(axis, "output")
        self._settle_pieces()
        self._settle_choices()
        return self._collect()

    def _live(self) -> set[Node]:
        # What is read only for its shape (a slice that a mask is sized by) constrains nothing.
        pending = [node for node in self.graph.graph.nodes if node.op == "output"]
        live: set[Node] = set()
        while pending:
            node = pending.pop()
            if node not in live:
                live.add(node)
                if node.op != "call_function" or name_of(node) not in UNIFORM:
                    pending += node.all_input_nodes
        return live

    def _statistics(self) -> Iterator[str]:
        # Running statistics move with their channels; any other buffer holds positions or constants.
        for node in self.graph.graph.nodes:
            if node.op == "call_function" and "batch_norm" in str(node.target):
                yield from (source.name for source in node.all_input_nodes)

    def _placeholder(self, node: Node, statistics: set[str]) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return
        name = self.sources.get(node.name)
        if name is None:
            self.env[node] = fresh(list(value.shape), "constant" if node.name in self.constants else "input")
            return
        tensor = self.tensors[name]
        if id(tensor) not in self.shared:
            why = "buffer" if node.name in self.buffers and node.name not in statistics else None
            self.shared[id(tensor)] = fresh(list(tensor.shape), why)
        self.env[node] = self.shared[id(tensor)]

    def _constant(self, node: Node) -> None:
        value: Any = self.graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            self.env[node] = fresh(list(value.shape), "constant")

    def _call(self, node: Node) -> None:
        if node.target is operator.getitem:
            source, position = node.args[0], node.args[1]
            found = self.env.get(source) if isinstance(source, Node) else None
            if isinstance(found, tuple) and isinstance(source, Node) and isinstance(position, int):
                self.env[node] = found[position]
                if (source, position) in self.choices:
                    self.choices[node, 0] = self.choices[source, position]
            elif found is not None and not isinstance(found, tuple):
                self.env[node] = found
            return
        name = name_of(node)
        value = node.meta.get("val")
        if name in SILENT or not isinstance(value, (torch.Tensor, list, tuple)):
            return
        call = Call(name, node, self.env, self.reads, self.choices, self.sums)
        for source in call.tensors:
            if name in CARRIES and (source, 0) in self.choices:
                self.choices[node, 0] = self.choices[source, 0]
            elif name not in CHOOSES or source is node.args[0]:
                self._named(source, f"its positions are used by {name}")
        if not call.tensors:
            outputs = value if isinstance(value, (list, tuple)) else [value]
            why = None if name in UNIFORM else "constant"
            made = tuple(fresh(list(item.shape), why) for item in outputs if isinstance(item, torch.Tensor))
            self.env[node] = made if isinstance(value, (list, tuple)) else made[0]
            return
        rule = RULES.get(name)
        try:
            if rule is None:
                raise UnsupportedOp(f"unknown operation {name}")
            self.env[node] = rule(call)
        except (UnsupportedOp, KeyError, IndexError, TypeError, ValueError) as error:
            # A rule that does not fit this use of its operation must cost alignment, never correctness.
            self.unknown[f"{name}: {error}" if rule else name] += 1
            self.env[node] = unknown(call)

    def _named(self, node: Node, why: str) -> None:
        # Numbers that name positions mean something else once the axis is in another order.
        if (node, 0) in self.choices:
            freeze(self.choices[node, 0].axis, why)

    def _settle_pieces(self) -> None:
        """Keep the units of packed pieces apart only where the spec can express it, and where they differ."""
        while True:
            held = self._held()
            atoms = {id(atom): atom for atoms in held for atom in atoms.values() if _packed(atom)}
            alike = [atom for atom in atoms.values() if not self._apart(atom, held)]
            if not alike:
                return
            for atom in alike:
                settle(atom)

    def _apart(self, atom: Atom, held: Sequence[Mapping[int, Atom]]) -> bool:
        along, ways = expand([cast(Atom, atom.along)]), [expand(copy) for copy in atom.copies.values()]
        everywhere = len(along) == 1 and len(ways) == along[0].size
        if len(along) != 1 or (everywhere and all(way == ways[0] for way in ways)):
            return False
        if everywhere and all(leaf.frozen for way in ways for leaf in way):
            return False
        if any(id(atom) in atoms and id(along[0]) not in atoms for atoms in held):
            return False
        # A packed axis is written piece by piece: what differs has to come after the pieces.
        axes = [expand(axis) for shaped in self.shared.values() for axis in shaped]
        return all(along[0] in axis[: axis.index(atom)] for axis in axes if atom in axis)

    def _settle_choices(self) -> None:
        """Nest the units at chosen positions (of each expert) in these where no tensor mixes the positions."""
        held = self._held()
        differing = {id(atom): atom for atoms in held for atom in atoms.values() if atom.along and not _packed(atom)}
        nested: list[tuple[Atom, Axis]] = []
        mixed: set[int] = set()
        for atom in differing.values():
            inner = [leaf for copy in atom.copies.values() for leaf in expand(copy) if not leaf.frozen]
            if self._nests(atom, held):
                nested.append((cast(Atom, atom.along), inner))
            else:
                mixed |= {id(leaf) for leaf in inner}
        for atom in differing.values():
            settle(atom)
        for along, inner in nested:
            if not mixed & {id(leaf) for leaf in inner}:
                self.within |= {id(leader(leaf)): leader(along) for leaf in inner}

    def _nests(self, atom: Atom, held: Sequence[Mapping[int, Atom]]) -> bool:
        along = expand([cast(Atom, atom.along)])
        if len(along) != 1 or along[0].frozen or any(id(atom) in atoms and id(along[0]) not in atoms for atoms in held):
            return False
        for choice, copy in atom.copies.items():
            holders = {id(holder) for holder in expand(cast(Choice, choice).holders)}
            for leaf in expand(copy):
                if leaf is atom or leaf.along is not None:
                    return False
                if not leaf.frozen and any(id(leaf) in atoms and not holders <= atoms.keys() for atoms in held):
                    return False
        return self._stands_alone(along[0], atom)

    def _stands_alone(self, along: Atom, atom: Atom) -> bool:
        # The elements that inner units belong to have to be a whole other axis of the tensor.
        for shaped in self.shared.values():
            axes = [expand(axis) for axis in shaped]
            if any(atom in axis for axis in axes) and [along] not in axes:
                return False
        return True

    def _held(self) -> list[dict[int, Atom]]:
        """By tensor, of the model or on the way, the atoms of all its axes."""
        every = [
            *self.shared.values(),
            *self.sums,
            *(axes for result in self.env.values() for axes in self._tuple(result)),
        ]
        return [{id(atom): atom for axis in axes for atom in expand(axis)} for axes in every]

    @staticmethod
    def _tuple(result: Result) -> tuple[Axes, ...]:
        return result if isinstance(result, tuple) else (result,)

    def _collect(self) -> Spec:
        names: dict[int, str] = {}
        members: dict[str, Atom] = {}

        def factors(atoms: Axis, tensor: str, *path: int) -> tuple[Factor, ...]:
            found: list[Factor] = []
            for depth, atom in enumerate(atoms):
                here = (*path, depth) if len(atoms) > 1 else path
                after = atoms[depth + 1 :]
                if any(_packed(inner) and leader(cast(Atom, inner.along)) is atom for inner in after):
                    ways = [_at_position(after, atom, position) for position in range(atom.size)]
                    return (*found, join(factors(way, tensor, *here, position) for position, way in enumerate(ways)))
                if atom.frozen:
                    found.append(Factor(atom.size, None, atom.frozen))
                    continue
                group = names.setdefault(id(atom), f"{tensor}[{'.'.join(map(str, here))}]")
                members[group] = atom
                found.append(Factor(atom.size, group))
            # An axis of length one keeps its length as a frozen factor.
            return tuple(found) or (Factor(1, None, "length one"),)

        axes: dict[str, tuple[tuple[Factor, ...], ...]] = {}
        for name, tensor in self.state.items():
            shaped = self.shared.get(id(tensor)) or fresh(list(tensor.shape), "not used by the model's forward")
            axes[name] = tuple(factors(expand(axis), name, dim) for dim, axis in enumerate(shaped))
        within = self._nesting(names, axes)
        groups = {name: Group(name, atom.size, within[name]) for name, atom in members.items()}
        read = {
            (id(self.tensors[self.sources[node.name]]), dim) for node, dim in self.reads if node.name in self.sources
        }
        reads = frozenset(
            (n, d) for n, tensor in self.state.items() for d in range(tensor.ndim) if (id(tensor), d) in read
        )
        return Spec(groups, axes, reads, dict(self.unknown))

    def _nesting(
        self, names: Mapping[int, str], axes: Mapping[str, tuple[tuple[Factor, ...], ...]]
    ) -> dict[str, tuple[str, ...]]:
        """For each group the groups it lies inside of: before it on every axis, and present in every tensor."""
        before: dict[str, list[str]] = {}
        for piece in (piece for shape in axes.values() for factors in shape for piece in pieces(factors)):
            groups = [factor.group for factor in piece.factors if factor.group]
            for depth, group in enumerate(groups):
                outer = [name for name in groups[:depth] if name != group]
                seen = before.get(group)
                before[group] = outer if seen is None else [name for name in seen if name in outer]
        for held in self._held():
            shown = [*held.values(), *(leaf for atom in held.values() for leaf in _copies(atom))]
            present = {names[id(atom)] for atom in shown if id(atom) in names}
            for group in present:
                before[group] = [name for name in before[group] if name in present]
        chosen = {names[inner]: names[id(outer)] for inner, outer in self.within.items() if inner in names}
        # A group may only lie in groups that lie in none: two levels are all that attention needs.
        tops = {name for name, outer in before.items() if not outer and name not in chosen}
        nested = {name: tuple([item for item in outer if item in tops][-1:]) for name, outer in before.items()}
        return nested | {name: (outer,) for name, outer in chosen.items() if outer in tops}


def _packed(atom: Atom) -> bool:
    """Whether it differs along the pieces of a packed axis, not along what was chosen."""
    return atom.along is not None and not any(isinstance(position, Choice) for position in atom.copies)


def _copies(atom: Atom) -> Axis:
    return [leaf for copy in atom.copies.values() for leaf in expand(copy)]


def _at_position(axis: Axis, along: Atom, position: int) -> Axis:
    """The axis at one position of a packed axis."""
    out: Axis = []
    for atom in axis:
        differs = atom.along is not None and leader(atom.along) is along
        # Nothing reads a piece that was never taken out.
        unread = [Atom(atom.size, "not used by the model's forward")]
        out += expand(atom.copies.get(position, unread)) if differs else [atom]
    return out
