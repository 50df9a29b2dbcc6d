"""No package uses what another package calls private: modules and names that begin with an underscore."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_package_imports_another_packages_private_names() -> None:
    found = {
        str(file.relative_to(ROOT)): names
        for folder in ("src/modelweld", "flows")  # which is modelweld.flows
        for file in sorted((ROOT / folder).rglob("*.py"))
        if (names := list(foreign_private_names(file.read_text(encoding="utf-8"), package_of(file))))
    }
    assert found == {}


def test_a_private_name_of_another_package_is_found() -> None:
    source = "from modelweld.engine.plan import _sizes, Plan\nfrom modelweld.engine._plan import Plan\n"
    found = ["modelweld.engine.plan._sizes", "modelweld.engine._plan.Plan"]
    assert list(foreign_private_names(source, "modelweld.stages")) == found
    assert list(foreign_private_names(source, "modelweld.engine")) == []


def package_of(file: Path) -> str:
    """`modelweld.engine` for src/modelweld/engine/plan.py; a module beside the packages is one of its own."""
    folders = file.relative_to(ROOT).with_suffix("").parts
    parts = folders[1:] if folders[0] == "src" else folders
    return ".".join(parts[:2] if parts[0] == "modelweld" else ("modelweld", parts[0]))


def foreign_private_names(source: str, package: str) -> Iterator[str]:
    """What the source imports from modelweld, under a private name, from outside `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "modelweld":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                private = any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
                if private and not f"{name}.".startswith(f"{package}."):
                    yield name
