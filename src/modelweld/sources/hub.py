"""A model or dataset repository of the Hugging Face Hub, or of whatever HF_ENDPOINT points to."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HfUriError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, parse_hf_uri

from modelweld.errors import SourceError, SourceUnavailable
from modelweld.sources.licence import licence_of
from modelweld.sources.refusals import first_line
from modelweld.sources.retrying import resuming, skip_prefix, with_retries
from modelweld.sources.source import STREAM_BYTES, Listed, Listing, Source, first_bytes

_TIMEOUT_S = 30.0
_TOKEN_HINT = "check the name; a private or gated repository needs HF_TOKEN in the environment"  # noqa: S105


class HubRepository(Source):
    """`hf://org/name@revision` or `hf://datasets/org/name@revision`, optionally with a folder or file after it."""

    streams = 4

    def __init__(self, address: str, project_root: Path, where: str) -> None:
        super().__init__(address, project_root, where)
        try:
            self._uri = parse_hf_uri(address)
        except HfUriError as error:
            raise SourceError(str(error), where=where, hint="hf://org/name@revision") from error
        if self._uri.type not in ("model", "dataset"):
            raise SourceError(f"a {self._uri.type} of the Hub is no source", where=where, hint="hf://org/name@revision")
        self._revision = self._uri.revision
        # False ignores a login stored on this machine: the environment alone decides what a run may read.
        self._token: str | bool = os.environ.get("HF_TOKEN") or False
        self._endpoint = os.environ.get("HF_ENDPOINT") or None

    def resolve(self) -> Listing:
        """The commit that the revision names now, and its files; large ones come with the Hub's SHA-256."""
        api = HfApi(endpoint=self._endpoint, token=self._token)
        uri = self._uri
        ask = api.model_info if uri.type == "model" else api.dataset_info
        with self._explained():
            info = with_retries(
                lambda: ask(uri.id, revision=uri.revision, files_metadata=True, timeout=_TIMEOUT_S), _is_transient
            )
        if not info.sha:
            raise self.not_found(f"{uri.id} names no commit")
        # A branch may move between the listing and the reading: from here on only the commit is asked for.
        self._revision = info.sha
        below = f"{uri.path_in_repo}/" if uri.path_in_repo else ""
        files = {}
        for sibling in info.siblings or []:
            name = sibling.rfilename
            if uri.path_in_repo and name == uri.path_in_repo:
                below = name[: len(name) - len(name.rpartition("/")[2])]
            elif not name.startswith(below):
                continue
            size = sibling.lfs.size if sibling.lfs else sibling.size
            files[name.removeprefix(below)] = Listed(size or 0, sha256=sibling.lfs.sha256 if sibling.lfs else None)
            if name == uri.path_in_repo:
                files = {name.removeprefix(below): files[name.removeprefix(below)]}
                break
        if not files:
            raise self.not_found(f"{uri.path_in_repo or uri.id} holds no files at {info.sha[:12]}")
        folder = "datasets/" if uri.type == "dataset" else ""
        tail = f"/{uri.path_in_repo}" if uri.path_in_repo else ""
        return Listing(
            resolved=f"hf://{folder}{uri.id}@{info.sha}{tail}",
            revision=info.sha,
            files=files,
            licence=licence_of(info.card_data.to_dict()) if info.card_data else None,  # type: ignore[no-untyped-call]
        )

    def read(self, name: str, listed: Listed, offset: int = 0) -> Generator[bytes, None, None]:
        """One file's bytes from `offset` on, in one ranged request that goes on where it breaks off."""
        yield from self._read(name, listed, offset, None)

    def beginning(self, name: str, listed: Listed, count: int) -> bytes:
        """The first bytes of a file, in one request for no more."""
        wanted = min(count, listed.size_bytes)
        return first_bytes(self._read(name, replace(listed, size_bytes=wanted), 0, wanted), wanted)

    def _read(self, name: str, listed: Listed, offset: int, end: int | None) -> Generator[bytes, None, None]:
        path = self._uri.path_in_repo
        inside = path if path and path.rpartition("/")[2] == name else f"{path}/{name}" if path else name
        url = hf_hub_url(
            self._uri.id,
            inside,
            repo_type=self._uri.type,
            revision=self._revision,
            endpoint=self._endpoint,
        )

        def open_at(start: int) -> Iterator[bytes]:
            # Without this, an edge server may send small files compressed, and ranges would count compressed bytes.
            headers = {**build_hf_headers(token=self._token), "Accept-Encoding": "identity"}
            if start or end is not None:
                headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
            with http_stream_backoff(
                "GET", url, max_retries=0, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True
            ) as response:
                hf_raise_for_status(response)
                blocks = response.iter_bytes(STREAM_BYTES)
                yield from skip_prefix(0 if response.status_code == HTTPStatus.PARTIAL_CONTENT else start, blocks)

        if offset < listed.size_bytes:
            with self._explained():
                yield from resuming(open_at, offset, _is_transient)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OfflineModeIsEnabled as error:
            raise SourceUnavailable(
                "the Hub is switched off", where=self.where, hint="unset HF_HUB_OFFLINE, or use a local path"
            ) from error
        except RevisionNotFoundError as error:
            raise self.not_found(f"{self._uri.id} has no revision {self._uri.revision!r}") from error
        except GatedRepoError as error:
            raise self.not_found(
                f"{self._uri.id} is gated", "accept its terms on the Hub and set HF_TOKEN in the environment"
            ) from error
        except RepositoryNotFoundError as error:
            raise self.not_found(f"no {self._uri.type} {self._uri.id} on the Hub", _TOKEN_HINT) from error
        except HFValidationError as error:
            raise self.not_found(str(error)) from error
        except HfHubHTTPError as error:
            if _is_transient(error):
                raise self._unavailable(error) from error
            raise self.not_found(f"the Hub refused: {first_line(error)}", _TOKEN_HINT) from error
        except httpx2.HTTPError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> SourceUnavailable:
        return SourceUnavailable(
            f"the Hub did not answer: {first_line(error)}",
            where=f"{self.where} ({self.address})",
            hint="check the network and HF_ENDPOINT, then run it again: it goes on where it stopped",
        )


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500
    return isinstance(error, httpx2.TransportError)
