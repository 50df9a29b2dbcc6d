"""What `mkdocs build` runs beside its plugins: pages made from the code, and pages that stand outside docs/."""

from __future__ import annotations

from pathlib import Path

import reference_pages
import repository_pages as repository
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the decisions in the navigation, so that a new page in docs/adr needs no entry in mkdocs.yml."""
    decisions = next(entry["Decisions"] for entry in config.nav or () if "Decisions" in entry)
    decisions.extend(f"adr/{path.name}" for path in sorted((ROOT / "docs" / "adr").glob("0*.md")))
    return config


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
