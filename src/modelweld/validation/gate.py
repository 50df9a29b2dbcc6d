"""The gate file: what was expected, what was found, where, and how to fix it. Deterministic, without a clock."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from modelweld.errors import GateRefused

__all__ = ["Gate", "Result", "stable"]

DIGITS = 6
SHOWN = 25


@dataclass(frozen=True)
class Result:
    """One expectation about one subject. `where` and `hint` are set when it failed."""

    subject: str
    expectation: str
    critical: bool
    success: bool
    observed: Any
    where: str | None = None
    hint: str | None = None


@dataclass(frozen=True)
class Gate:
    """All results, sorted; `fail` when one that is critical did not succeed."""

    results: tuple[Result, ...]

    @classmethod
    def of(cls, results: Iterable[Result]) -> Gate:
        """The gate over these results, in whatever order they came."""
        return cls(tuple(sorted(results, key=lambda result: (result.subject, result.expectation))))

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """`fail` when a critical expectation failed."""
        return "fail" if self.refusals else "pass"

    @property
    def refusals(self) -> tuple[Result, ...]:
        """The critical failures."""
        return tuple(result for result in self.results if result.critical and not result.success)

    @property
    def warnings(self) -> tuple[Result, ...]:
        """The failures that stop nothing."""
        return tuple(result for result in self.results if not result.critical and not result.success)

    def document(self) -> dict[str, Any]:
        """What gate.json holds."""
        return {
            "version": 2,
            "verdict": self.verdict,
            "results": [{**asdict(result), "observed": stable(result.observed)} for result in self.results],
        }

    def write(self, path: Path) -> None:
        """Write gate.json: the same checks over the same files give the same bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.document(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        # A file that DVC has linked into its cache is read-only and shared: replace it, never write into it.
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(path)

    def refuse(self, path: Path) -> None:
        """Raise GateRefused, with a table of what failed, unless the verdict is `pass`."""
        failed = self.refusals
        if failed:
            raise GateRefused(
                f"validation refused this run, {len(failed)} critical "
                f"{'expectation' if len(failed) == 1 else 'expectations'} failed\n{_grid(failed)}",
                where=str(path),
                hint="as the table says, then run the same command again; nothing was computed yet",
            )


def stable(value: Any) -> Any:
    """The value as JSON that does not change with the order of a sum: floats keep six significant digits."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): stable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [stable(item) for item in value]
    return value if isinstance(value, (int, str)) else str(value)


def _grid(results: tuple[Result, ...]) -> str:
    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("subject", "expectation", "where", "observed", "hint"):
        grid.add_column(heading, overflow="fold")
    for result in results[:SHOWN]:
        observed = json.dumps(stable(result.observed), ensure_ascii=False)
        grid.add_row(result.subject, result.expectation, result.where, observed, result.hint)
    # Markup off: a test row may well hold square brackets.
    sink = Console(file=io.StringIO(), width=160, markup=False, highlight=False, color_system=None)
    sink.print(grid)
    text: str = sink.file.getvalue().rstrip()  # type: ignore[attr-defined]
    more = len(results) - SHOWN
    return f"{text}\n… and {more} more in the gate file" if more > 0 else text
