"""What the documented packages export: all their public names, and all that README and docs tell people to use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import modelweld

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "modelweld",
    *(f"modelweld.{name}" for name in modelweld.__all__ if isinstance(getattr(modelweld, name), ModuleType)),
)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("README.md")])
PYTHON = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"`(modelweld(?:\.\w+)+)\(")


@pytest.mark.parametrize("package", PACKAGES)
def test_all_lists_every_public_name(package: str) -> None:
    module = import_module(package)
    listed = list(module.__all__)
    assert len(listed) == len(set(listed))
    assert {name for name in dir(module) if is_public(module, name)} == set(listed)


def is_public(module: ModuleType, name: str) -> bool:
    """Submodules that something else imported, and what comes from other libraries, are no public names."""
    if name.startswith("_") or name in module.__all__:
        return not name.startswith("_")
    value = getattr(module, name)
    if isinstance(value, ModuleType) or name in ("annotations", "TYPE_CHECKING"):
        return False
    return getattr(value, "__module__", "modelweld").split(".")[0] == "modelweld"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_listed_name_is_there_and_documented(package: str) -> None:
    module = import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value) or isinstance(value, ModuleType):
            assert (value.__doc__ or "").strip(), f"{package}.{name} has no docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_a_page_in_the_reference(package: str) -> None:
    name = package.removeprefix("modelweld.")
    page, nav = ROOT / f"docs/reference/api/{name}.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"reference/api/{name}.md" in nav
    if package != "modelweld.merging":  # made by docs/_generate
        assert f"::: {package}\n" in page.read_text(encoding="utf-8")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'weld'"):
        modelweld.weld  # noqa: B018


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_documentation_uses_is_exported(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    used = {*(name for block in PYTHON.findall(text) for name in names_used(block)), *CALL.findall(text)}
    assert not [name for name in sorted(used) if not is_exported(name)]


def names_used(source: str) -> Iterator[str]:
    """The dotted names of modelweld that a piece of code imports or looks up."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "modelweld":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "modelweld":
            yield f"modelweld.{node.attr}"


def is_exported(name: str) -> bool:
    package, _, attribute = name.rpartition(".")
    return package in PACKAGES and attribute in import_module(package).__all__


def test_names_that_are_not_exported_are_found() -> None:
    block = "import modelweld\nfrom modelweld.engine import Plan\nmodelweld.weld(1)\nmodelweld.load('x')\n"
    assert [name for name in names_used(block) if not is_exported(name)] == ["modelweld.engine.Plan", "modelweld.weld"]
