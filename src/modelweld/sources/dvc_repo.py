"""A file or directory of another DVC project, at one revision of its git."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from modelweld.errors import SourceError, SourceUnavailable
from modelweld.sources.refusals import first_line
from modelweld.sources.source import BLOCK_BYTES, Listed, Listing, Source

# The repository may hold an @ (git@host:org/repo), so the last one counts; a git revision holds neither @ nor colon.
_ADDRESS = re.compile(r"^dvc://(?P<repo>.*)@(?P<rev>[^@:]+):(?P<path>[^@]+)$")


class DvcPath(Source):
    """`dvc://repo@rev:path`: `repo` is a git URL or a directory, a relative one taken from the project's root."""

    def __init__(self, address: str, project_root: Path, where: str) -> None:
        super().__init__(address, project_root, where)
        parts = _ADDRESS.match(address)
        if parts is None:
            raise SourceError(f"{address} is not dvc://repo@rev:path", where=where, hint="dvc://../zoo@v1:models/a")
        self._repo = parts["repo"]
        self._rev = parts["rev"]
        self._path = parts["path"].strip("/")
        local = (project_root.absolute() / (self._repo or ".")).resolve()
        self._url = str(local) if local.is_dir() else self._repo

    @cached_property
    def _fs(self) -> Any:
        from dvc.api import DVCFileSystem

        return DVCFileSystem(self._url, rev=self._rev)

    def resolve(self) -> Listing:
        """The commit behind the revision, and every file that git or DVC hold below the path there."""
        with self._explained():
            commit = str(self._fs.repo.get_rev())
            if self._fs.info(self._path)["type"] == "file":
                found = {self._path.rpartition("/")[2]: self._fs.info(self._path)}
            else:
                names = self._fs.find(self._path, detail=True)
                found = {str(name).strip("/").removeprefix(f"{self._path}/"): info for name, info in names.items()}
            files = {name: Listed(self._size(info)) for name, info in found.items()}
        return Listing(resolved=f"dvc://{self._repo}@{commit}:{self._path}", revision=commit, files=files)

    def read(self, name: str, listed: Listed, offset: int = 0) -> Generator[bytes, None, None]:
        """One file's bytes from `offset` on, from the project's cache or its DVC remote."""
        with self._explained():
            single = self._fs.info(self._path)["type"] == "file"
            with self._fs.open(self._path if single else f"{self._path}/{name}", "rb") as stream:
                stream.seek(offset)
                while block := stream.read(BLOCK_BYTES):
                    yield block

    def _size(self, info: dict[str, Any]) -> int:
        if info.get("size") is not None:
            return int(info["size"])
        # DVC's record of a directory holds digests only; the end of an open file is its size.
        with self._fs.open(info["name"], "rb") as stream:
            return int(stream.seek(0, os.SEEK_END))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from dvc.exceptions import DvcException
        from dvc.scm import CloneError, RevError
        from dvc_data.index import DataIndexDirError
        from scmrepo.exceptions import SCMError

        try:
            yield
        except RevError as error:
            raise self.not_found(f"{self._repo or '.'} has no revision {self._rev!r}") from error
        except CloneError as error:
            raise SourceUnavailable(
                f"{self._repo} cannot be cloned: {first_line(error)}",
                where=self.where,
                hint="check the address, the network, and that git may read it without asking",
            ) from error
        except (FileNotFoundError, DataIndexDirError) as error:
            raise self.not_found(
                f"{self._path} is not in {self._repo or '.'} at {self._rev}, or its data is in no remote",
                "check the path with `dvc list`, and `dvc push` in that project",
            ) from error
        except (DvcException, SCMError) as error:
            raise self.not_found(f"{self._repo or '.'}: {first_line(error)}") from error
        except (ConnectionError, TimeoutError) as error:
            raise SourceUnavailable(
                f"the DVC remote of {self._repo} did not answer: {first_line(error)}",
                where=self.where,
                hint="check the network, then run it again: it goes on where it stopped",
            ) from error
