"""A directory or a file on this machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from modelweld.config.addresses import expanded, scheme_of
from modelweld.sources.source import BLOCK_BYTES, Listed, Listing, Source


class LocalPath(Source):
    """Files under a path, hidden ones left out. There is no revision: the digests are what pins it."""

    def __init__(self, address: str, project_root: Path, where: str) -> None:
        super().__init__(address, project_root, where)
        path = unquote(urlsplit(address).path) if scheme_of(address) else address
        self._root = (self.project_root / expanded(path)).resolve()

    @property
    def directory(self) -> Path | None:
        """The directory itself; None for a single file."""
        return self._root if self._root.is_dir() else None

    def resolve(self) -> Listing:
        """Every regular file below the path; symbolic links that lead elsewhere are refused."""
        if self._root.is_file():
            files = {self._root.name: Listed(self._root.stat().st_size)}
        elif self._root.is_dir():
            files = dict(self._walk(self._root))
        else:
            raise self.not_found(
                f"no such file or directory: {self._root}", "relative paths start at the project's root"
            )
        project_root = self.project_root.resolve()
        inside = self._root.is_relative_to(project_root)
        resolved = self._root.relative_to(project_root).as_posix() if inside else self._root.as_posix()
        return Listing(resolved=resolved, revision=None, files=files)

    def read(self, name: str, listed: Listed, offset: int = 0) -> Generator[bytes, None, None]:
        """The file's bytes from `offset` on."""
        path = self._root if self._root.is_file() else self._root / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
                raise self.not_found(f"{path} is no longer a file", "put it back, or run `modelweld pin`")
            with path.open("rb") as stream:
                stream.seek(offset)
                while block := stream.read(BLOCK_BYTES):
                    yield block
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self.not_found(
                f"no such file: {path}", "put it back, or run `modelweld pin` to pin what is there"
            ) from (error)
        except PermissionError as error:
            raise self.not_found(f"not readable: {path}", "give this user the right to read it") from error

    def _walk(self, directory: Path) -> Iterator[tuple[str, Listed]]:
        for entry in sorted(os.scandir(directory), key=lambda item: item.name):
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            name = path.relative_to(self._root).as_posix()
            if entry.is_symlink():
                self._check_link(path, name)
            mode = self._stat(path, name).st_mode
            if stat.S_ISDIR(mode):
                yield from self._walk(path)
            elif stat.S_ISREG(mode):
                yield name, Listed(path.stat().st_size)
            else:
                raise self.not_found(f"{name} is neither a file nor a directory", "take it out of the directory")

    def _stat(self, path: Path, name: str) -> os.stat_result:
        try:
            return path.stat()
        except FileNotFoundError as error:
            raise self.not_found(f"{name} is a broken symbolic link", "remove it, or put its target back") from error

    def _check_link(self, path: Path, name: str) -> None:
        # A directory behind a link could hold the link itself, so only files are followed.
        target = path.resolve()
        if not target.is_relative_to(self._root) or target.is_dir():
            raise self.not_found(
                f"{name} is a symbolic link that leaves the directory (to {target})"
                if not target.is_dir()
                else f"{name} is a symbolic link to a directory",
                "copy the source with `cp -rL`, which replaces links by what they point to",
            )
