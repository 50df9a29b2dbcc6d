"""A model version of an MLflow registry, by alias or number."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from modelweld.errors import SourceError, SourceUnavailable
from modelweld.formats.address import TAG_PREFIX, DvcAddress
from modelweld.sources.dvc_repo import DvcPath
from modelweld.sources.local import LocalPath
from modelweld.sources.refusals import first_line, refuse_secrets
from modelweld.sources.source import BLOCK_BYTES, Listed, Listing, Source

_ADDRESS = re.compile(r"^models:/(?P<name>[^@]+?)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")
_OWN_FILES = re.compile(r"^(MLmodel|conda\.yaml|python_env\.yaml|requirements\.txt|registered_model_meta|metadata/.*)$")
_MISSING = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND", "ENDPOINT_NOT_FOUND"})
_REFUSED = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED"})


class MlflowModel(Source):
    """`models:/name@alias` or `models:/name/3` of the server at MLFLOW_TRACKING_URI (default: the project's mlflow.db).

    A version that holds a Hugging Face directory somewhere inside (MLflow's transformers flavour keeps it in `model/`,
    its tokenizer in `components/tokenizer/`) is listed as that directory. A version that modelweld registered is the
    DVC address it points to.
    """

    def __init__(self, address: str, project_root: Path, where: str) -> None:
        super().__init__(address, project_root, where)
        parts = _ADDRESS.match(address)
        if parts is None:
            raise SourceError(f"{address} names no version", where=where, hint="models:/name@alias or models:/name/3")
        self._name, self._alias, self._number = parts["name"], parts["alias"], parts["version"]

    @property
    def supports_range_reads(self) -> bool:
        """MLflow hands over whole artifacts, unless they lie on this machine or a pointer leads elsewhere."""
        return self._pointed is not None or isinstance(self._artifacts, LocalPath)

    def resolve(self) -> Listing:
        """The version behind the alias now; its revision is the id of the logged model, which never changes."""
        version = self._version
        tags: dict[str, str] = dict(version.tags)
        if self._pointed is not None:
            return self._pointed.resolve()
        with self._explained():
            files = {name: Listed(size) for name, (_, size) in self._layout.items()}
        return Listing(
            resolved=f"models:/{self._name}/{version.version}",
            # A deleted version's number is given out again; where its artifacts lie, and since when, is not.
            revision=_logged_model(version.source) or f"{version.source}#{version.creation_timestamp}",
            files=files,
            licence=tags.get("licence") or tags.get("license"),
        )

    def read(self, name: str, listed: Listed, offset: int = 0) -> Generator[bytes, None, None]:
        """One artifact's bytes from `offset` on. MLflow hands over whole files, so one is downloaded, then read."""
        if self._pointed is not None:
            yield from self._pointed.read(name, listed, offset)
            return
        if isinstance(self._artifacts, LocalPath):
            yield from self._artifacts.read(self._artifact(name), listed, offset)
            return
        with self._explained():
            artifact = self._artifact(name)
            # The system's temporary directory may be a small one in memory; the project's disk has room for weights.
            staging = self.project_root / ".modelweld/staging"
            staging.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="mlflow-", dir=staging) as folder:
                path = Path(self._artifacts.download_artifacts(artifact, folder))
                with path.open("rb") as stream:
                    stream.seek(offset)
                    while block := stream.read(BLOCK_BYTES):
                        yield block

    @property
    def _tracking_uri(self) -> str:
        named = os.environ.get("MLFLOW_TRACKING_URI")
        database = self.project_root / "mlflow.db"
        if not named and not database.exists():
            raise SourceError(
                "there is no MLflow here",
                where=self.where,
                hint="set MLFLOW_TRACKING_URI to the server that holds the model",
            )
        return named or f"sqlite:///{database}"

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        tracking = self._tracking_uri
        return MlflowClient(tracking_uri=tracking, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or tracking)

    @cached_property
    def _version(self) -> Any:
        with self._explained():
            if self._alias:
                return self._client.get_model_version_by_alias(self._name, self._alias)
            return self._client.get_model_version(self._name, self._number)

    @cached_property
    def _artifacts(self) -> Any:
        """What reads the version's artifacts: a LocalPath when they lie on this machine, else MLflow's repository."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        location = self._client.get_model_version_download_uri(self._name, self._version.version)
        if urlsplit(location).scheme in ("", "file"):
            return LocalPath(location, self.project_root, self.where)
        return get_artifact_repository(location, tracking_uri=self._tracking_uri)

    @cached_property
    def _layout(self) -> dict[str, tuple[str, int]]:
        """Name in the Hugging Face directory to (artifact path, size)."""
        if isinstance(self._artifacts, LocalPath):
            sizes = {name: listed.size_bytes for name, listed in self._artifacts.resolve().files.items()}
        else:
            sizes = dict(_walk(self._artifacts, None))
        holders = sorted({str(PurePosixPath(name).parent) for name in sizes}, key=lambda folder: (len(folder), folder))
        homes = [folder for folder in holders if _join(folder, "config.json") in sizes]
        if not homes:
            raise self.not_found(
                f"{self._name} version {self._version.version} holds no Hugging Face directory (no config.json)",
                "register it with mlflow.transformers.log_model, or log the directory as artifacts",
            )
        below = [f"{homes[0]}/" if homes[0] != "." else ""]
        if homes[0] != ".":
            below.append("components/tokenizer/")
        layout: dict[str, tuple[str, int]] = {}
        for prefix in below:
            for artifact, size in sizes.items():
                if artifact.startswith(prefix) and not _OWN_FILES.match(artifact):
                    layout.setdefault(artifact.removeprefix(prefix), (artifact, size))
        return layout

    def _artifact(self, name: str) -> str:
        if name not in self._layout:
            raise self.not_found(f"{name} is no longer in {self.address}")
        return self._layout[name][0]

    @cached_property
    def _pointed(self) -> DvcPath | None:
        tags: dict[str, str] = dict(self._version.tags)
        if f"{TAG_PREFIX}path" not in tags:
            return None
        # modelweld registers a version by pointer: these tags say where its weights are.
        pointed = DvcAddress.from_tags(tags, f"{self.where} ({self.address})")
        here = pointed.url is None or Path(pointed.repo).is_dir()
        # Of a project below the top of its repository, the remote URL names the top.
        place, path = (pointed.repo, pointed.path) if here else (pointed.url, f"{pointed.folder or ''}{pointed.path}")
        address = f"dvc://{place}@{pointed.rev}:{path}"
        refuse_secrets(address, self.where)
        return DvcPath(address, self.project_root, self.where)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            first = first_line(error)
            if error.error_code in _MISSING:
                raise self.not_found(
                    f"not in the registry: {first}",
                    "the Models page of the MLflow server lists names, versions and aliases",
                ) from (error)
            if error.error_code in _REFUSED:
                raise self.not_found(
                    f"MLflow refused: {first}", "set MLFLOW_TRACKING_TOKEN, or user and password, in the environment"
                ) from error
            raise SourceUnavailable(
                f"MLflow did not answer: {first}",
                where=f"{self.where} ({self.address})",
                hint="check that the server at MLFLOW_TRACKING_URI is up, then run it again",
            ) from error


def _logged_model(source: str) -> str | None:
    found = re.fullmatch(r"models:/(m-[0-9a-f]+)", source)
    return found[1] if found else None


def _walk(repository: Any, folder: str | None) -> Iterator[tuple[str, int]]:
    for item in repository.list_artifacts(folder):
        if item.is_dir:
            yield from _walk(repository, item.path)
        else:
            yield item.path, int(item.file_size or 0)


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"
