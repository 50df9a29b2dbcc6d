"""symmetry: which units of a model can be permuted, and what holds the others in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelweld.cli.app import app, emit, options

if TYPE_CHECKING:
    from modelweld.alignment.specs import Symmetry

_SHOWN = 3


@app.command()
def symmetry(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory, or a config.json.")],
    spec: Annotated[
        Path | None, typer.Option("--spec", help="Also write the spec file, to be changed by hand.")
    ] = None,
) -> None:
    """Print the groups of units that can be permuted together, and what froze every other axis."""
    from modelweld.alignment.specs import symmetry_of

    found = symmetry_of(model, Path())
    if spec is not None:
        spec.write_text(found.spec.to_json() + "\n", encoding="utf-8")
    emit(found.data(), None if options.json else _lines(found))


def _lines(found: Symmetry) -> str:
    from rich.markup import escape

    lines = [f"[bold]{escape(found.architecture)}[/]: {len(found.spec.groups)} groups of units can be permuted"]
    for name, axes in found.tensors().items():
        group = found.spec.groups[name]
        inside = f" in each of {escape(', '.join(group.within))}" if group.within else ""
        lines.append(f"  [bold]{escape(name)}[/]: {group.size} units{inside}, on {_some(axes)}")
    lines.append("what cannot be permuted, and why:")
    lines += [f"  [bold]{escape(why)}[/]: {_some(axes)}" for why, axes in found.frozen().items()]
    lines += [f"  unknown operation {escape(name)}, {count} times" for name, count in found.spec.unknown.items()]
    return "\n".join(lines)


def _some(axes: list[str]) -> str:
    from rich.markup import escape

    more = f" and {len(axes) - _SHOWN} more" if len(axes) > _SHOWN else ""
    return escape(", ".join(axes[:_SHOWN])) + more
