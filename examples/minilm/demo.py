"""The whole demo, or the showcase: make the experts, run the pipeline on them, and say how long both took.

python examples/minilm/demo.py             # make demo
python examples/minilm/demo.py showcase    # make showcase
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from prepare import prepare
from problems import Problem
from recipe import PLACES, Recipe, duration
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = {"demo": ROOT, "showcase": PLACES["showcase"][1].parent}


def main(name: str = "demo") -> int:
    """The exit code of the part that failed, else 0."""
    console = Console(stderr=True)
    began = time.monotonic()
    console.print(f"==> {name}: base model and experts", highlight=False, soft_wrap=True)
    try:
        todo = prepare(Recipe.read(name), console, PROJECTS[name] / "params.yaml")
    except Problem as problem:
        print(f"examples/minilm: {problem}", file=sys.stderr)
        return 1
    if not todo.anything:
        console.print("  up to date")
    prepared = time.monotonic()
    console.print(
        f"==> {name}: fetch → validate → merge → evaluate → register (modelweld run)", highlight=False, soft_wrap=True
    )
    code = subprocess.run([str(Path(sys.executable).with_name("modelweld")), "run"], cwd=PROJECTS[name]).returncode
    ended = time.monotonic()
    console.print(
        f"==> {name}: {duration(ended - began)} in all: experts {duration(prepared - began)}, "
        f"pipeline {duration(ended - prepared)}",
        highlight=False,
        soft_wrap=True,
    )
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
