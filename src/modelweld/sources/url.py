"""Anything fsspec speaks: a bucket, a web server, a share."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec

from modelweld.config.addresses import scheme_of
from modelweld.errors import SourceError, SourceUnavailable
from modelweld.sources.refusals import first_line
from modelweld.sources.retrying import resuming, skip_prefix, with_retries
from modelweld.sources.source import BLOCK_BYTES, STREAM_BYTES, Listed, Listing, Source

T = TypeVar("T")

# What an upstream calls the immutable state of one file, the strongest first.
_VERSION_KEYS = ("VersionId", "version_id", "generation", "ETag", "etag", "md5Hash", "content_md5", "Content-MD5")
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"})
_EXTRAS = {"s3": "modelweld[s3]", "s3a": "modelweld[s3]", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class FsspecUrl(Source):
    """A file or everything below a prefix. Object versions and etags are the revision where there are any."""

    streams = 4

    @property
    def _scheme(self) -> str:
        return str(scheme_of(self.address))

    @property
    def _is_web(self) -> bool:
        return self._scheme in ("http", "https")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            # Instances and their listings are cached by fsspec: a pin must see what is there now.
            fs, path = fsspec.url_to_fs(self.address, skip_instance_cache=True)
        except ImportError as error:
            package = _EXTRAS.get(self._scheme, f"the fsspec implementation of {self._scheme}://")
            raise SourceError(
                f"{self._scheme}:// needs a package that is not installed ({error})",
                where=self.where,
                hint=f"pip install '{package}'",
            ) from error
        except ValueError as error:
            raise SourceError(
                f"{self._scheme}:// is no kind of source: {error}",
                where=self.where,
                hint="use a path, hf://, models:/, dvc:// or an fsspec URL such as s3://",
            ) from error
        return fs, str(path)

    def resolve(self) -> Listing:
        """The file, or every file below the prefix, with the upstream's own version of each."""
        fs, path = self._opened
        with self._explained():
            found = self._with_retries(lambda: self._find(fs, path))
        if not found:
            raise self.not_found("nothing is there")
        files, tokens = {}, []
        for name, info in sorted(found.items()):
            token = _token(info)
            version = info.get("VersionId") if self._scheme.startswith("s3") else None
            size = info.get("size")
            if size is None:
                raise self.not_found(f"{name} has no known size", "the server must send a Content-Length")
            files[name] = Listed(int(size), version=version if version not in (None, "null") else None)
            tokens.append(f"{name}\0{size}\0{token}" if token else None)
        revision = None
        if all(tokens):
            joined = "\n".join(str(token) for token in tokens)
            single = _token(next(iter(found.values()))) if len(found) == 1 else None
            revision = single or f"tree:{hashlib.sha256(joined.encode()).hexdigest()[:40]}"
        return Listing(resolved=self.address, revision=revision, files=files)

    def read(self, name: str, listed: Listed, offset: int = 0) -> Generator[bytes, None, None]:
        """One file's bytes from `offset` on, of the pinned object version where the bucket keeps versions."""
        fs, root = self._opened
        with self._explained():
            path = self._with_retries(lambda: self._locate(fs, root, name))
            open_at = self._streamed(fs, path) if self._is_web else self._ranged(fs, path, listed)
            if offset < listed.size_bytes:
                yield from resuming(open_at, offset, self._is_transient)

    def beginning(self, name: str, listed: Listed, count: int) -> bytes:
        """The first bytes of a file; a web server that knows no ranges is not listened to any longer."""
        if not self._is_web:
            return super().beginning(name, listed, count)
        fs, root = self._opened
        wanted = min(count, listed.size_bytes)
        headers = {"Accept-Encoding": "identity", "Range": f"bytes=0-{wanted - 1}"}

        def first() -> bytes:
            with fs.open(self._locate(fs, root, name), "rb", block_size=0, size=1, headers=headers) as stream:
                stream.r.raise_for_status()
                found = b""
                while len(found) < wanted and (block := stream.read(wanted - len(found))):
                    found += block
                return found

        with self._explained():
            return self._with_retries(first) if wanted else b""

    def _ranged(self, fs: Any, path: str, listed: Listed) -> Callable[[int], Iterator[bytes]]:
        version = {"version_id": listed.version} if listed.version else {}

        def open_at(start: int) -> Iterator[bytes]:
            while start < listed.size_bytes:
                block: bytes = fs.cat_file(
                    path, start=start, end=min(start + BLOCK_BYTES, listed.size_bytes), **version
                )
                if not block:
                    return
                yield block
                start += len(block)

        return open_at

    def _streamed(self, fs: Any, path: str) -> Callable[[int], Iterator[bytes]]:
        def open_at(start: int) -> Iterator[bytes]:
            # A compressed answer would have another length, and ranges of it would mean something else.
            headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
            with fs.open(path, "rb", block_size=0, size=1, headers=headers) as stream:
                stream.r.raise_for_status()
                partial = stream.r.status == HTTPStatus.PARTIAL_CONTENT
                yield from skip_prefix(0 if partial else start, iter(lambda: stream.read(STREAM_BYTES), b""))

        return open_at

    def _find(self, fs: Any, path: str) -> dict[str, Mapping[str, Any]]:
        """Relative name to fsspec's info of every file; a single file goes by its own name."""
        fs.invalidate_cache()
        if self._is_web and not urlsplit(path).path.endswith("/"):
            return {_basename(path): fs.info(path)}
        if not self._is_web:
            info = fs.info(path)
            if info["type"] == "file":
                return {_basename(path): info}
        prefix = path.rstrip("/") + "/"
        # Left to itself, a walk leaves out a folder whose listing fails; object stores list without walking.
        strict = {} if self._scheme in _OBJECT_STORES else {"on_error": "raise"}
        names = [name for name in fs.find(path, **strict) if name.startswith(prefix) and name != prefix]
        # A listing does not tell object versions; asking for each file does.
        fs.invalidate_cache()
        return {unquote(name[len(prefix) :]) if self._is_web else name[len(prefix) :]: fs.info(name) for name in names}

    def _locate(self, fs: Any, root: str, name: str) -> str:
        if self._is_web:
            return root + name if urlsplit(root).path.endswith("/") else root
        if _basename(root) == name and fs.isfile(root):
            return root
        return f"{root.rstrip('/')}/{name}"

    def _with_retries(self, call: Callable[[], T]) -> T:
        return with_retries(call, self._is_transient)

    @cached_property
    def _outages(self) -> tuple[type[Exception], ...]:
        """What this kind of upstream raises when the way to it is broken, rather than the request."""
        outages: tuple[type[Exception], ...] = (ConnectionError, TimeoutError)
        if self._is_web:
            import aiohttp

            return (*outages, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
        if self._scheme.startswith("s3"):
            from botocore import exceptions

            return (*outages, exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.ResponseStreamingError)
        return outages

    @cached_property
    def _refusals(self) -> tuple[type[Exception], ...]:
        """What it raises, beside OSError, when the request itself is at fault."""
        if self._is_web:
            import aiohttp

            return (aiohttp.ClientResponseError, aiohttp.InvalidURL)
        if self._scheme.startswith("s3"):
            from botocore import exceptions

            return (exceptions.BotoCoreError,)
        return ()

    def _is_transient(self, error: BaseException) -> bool:
        # fsspec's web file system reports every failure of its first request as a missing file.
        if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
            error = error.__cause__
        status = _status(error)
        if status is not None:
            return status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500
        return isinstance(error, self._outages)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        caught: tuple[type[Exception], ...] = (OSError, *self._outages, *self._refusals)
        try:
            yield
        except caught as error:
            cause = error.__cause__ or error
            transient = self._is_transient(error)
            if isinstance(error, FileNotFoundError) and not transient and _status(cause) in (None, 404, 410):
                raise self.not_found(f"nothing is at {self.address}") from error
            if not transient and isinstance(error, (FileNotFoundError, PermissionError, *self._refusals)):
                raise self.not_found(
                    f"{self.address} was refused: {first_line(cause)}",
                    "give this process credentials through the environment (for S3: AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)",
                ) from error
            raise SourceUnavailable(
                f"no answer: {first_line(cause)}",
                where=f"{self.where} ({self.address})",
                hint="check the network and the endpoint, then run it again: it goes on where it stopped",
            ) from error


def _status(error: BaseException) -> int | None:
    """The HTTP status an error carries: aiohttp's own, or that of the S3 answer behind an OSError."""
    status = getattr(error, "status", None)
    if status is None:
        answer = getattr(error.__cause__ or error, "response", None)
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    return status if isinstance(status, int) else None


def _token(info: Mapping[str, Any]) -> str | None:
    for key in _VERSION_KEYS:
        value = info.get(key)
        # A weak etag promises equal meaning, not equal bytes.
        if value and value != "null" and not str(value).startswith("W/"):
            return str(value).strip('"')
    return None


def _basename(path: str) -> str:
    return unquote(posixpath.basename(urlsplit(path).path if "://" in path else path))
