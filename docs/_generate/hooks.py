"""What `mkdocs build` runs beside its plugins: pages made from the code, and pages that stand outside docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import reference_pages
import repository_pages as repository
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the parts of the navigation that follow from files and code: the decisions, and the documents' reference."""
    nav = config.nav or []
    decisions = sorted((ROOT / "docs" / "adr").glob("0*.md"))
    _part(nav, "Decisions").extend(f"adr/{path.name}" for path in decisions)
    documents = [{name: reference_pages.document_address(name)} for name in reference_pages.DOCUMENTS]
    _part(nav, "Reference").append({"Documents": documents})
    return config


def _part(nav: list[Any], title: str) -> list[Any]:
    return next(entry[title] for entry in nav if title in entry)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, the pages from outside docs/, and the files that any of them link to."""
    for address, content in reference_pages.pages():
        files.append(File.generated(config, address, content=content))
    for path, address in repository.PAGES.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / path)))
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for path in sorted(repository.linked_files(ROOT, texts)):
        files.append(File.generated(config, repository.site_address(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into the repository into links within the site."""
    return repository.rewritten(page.file.src_uri, markdown)
