"""Files of the repository beyond docs/ that the site shows too, and links between the two worlds.

In the repository README.md links to `docs/merging.md`, and docs/alignment.md to `../examples/fashion/README.md`. On the
site both are pages, at other addresses: links are rewritten, so that they work in both places.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

# Where a file of the repository is on the site. Other files that a page links to are published under `files/`.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "examples/minilm/README.md": "examples/minilm.md",
    "examples/fashion/README.md": "examples/fashion.md",
}

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def links(text: str) -> Iterator[str]:
    """The relative addresses that a Markdown text links to, without their anchors."""
    yield from _LINK.findall(text)


def repository_path(source: str) -> str:
    """Where the page with this address on the site stands in the repository."""
    of_page = {page: path for path, page in PAGES.items()}
    return of_page.get(source, f"docs/{source}")


def site_address(path: str) -> str:
    """The address on the site of a file of the repository."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")


def target(source: str, link: str) -> str:
    """The file of the repository that a link on this page means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(source)), link))


def rewritten(source: str, text: str) -> str:
    """The text of a page with its links into the repository turned into links within the site."""

    def address(found: re.Match[str]) -> str:
        return posixpath.relpath(site_address(target(source, found[0])), posixpath.dirname(source) or ".")

    return _LINK.sub(address, text)


def linked_files(root: Path, texts: Mapping[str, str]) -> set[str]:
    """The files outside docs/ that pages link to and that are no pages themselves."""
    found = {target(source, link) for source, text in texts.items() for link in links(text)}
    return {path for path in found if path not in PAGES and not path.startswith("docs/") and (root / path).is_file()}
