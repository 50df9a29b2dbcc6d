"""Reaching MLflow: which server, is it there, and what its failures mean."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelweld.errors import DiskFull, RegistryUnavailable

if TYPE_CHECKING:
    from mlflow import MlflowClient

PING_TIMEOUT_S = (3.0, 10.0)
COMPLETE_LATER = (
    "nothing is lost: start MLflow or correct MLFLOW_TRACKING_URI, then try again; `modelweld register` finishes a run"
)


def tracking_uri(project_root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the project's own sqlite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root.resolve() / 'mlflow.db'}"


def connect(uri: str) -> MlflowClient:
    """A client of the MLflow at `uri`, which answered; RegistryUnavailable within seconds when it does not."""
    _ping(uri)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    with guarded(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def guarded(uri: str) -> Iterator[None]:
    """Turn what MLflow, its database or its transport raise inside into RegistryUnavailable."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        message = str(error).strip().splitlines()
        raise RegistryUnavailable(
            f"MLflow failed: {message[0] if message else type(error).__name__}", where=uri, hint=COMPLETE_LATER
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull("no space left for MLflow's files", where=error.filename or uri) from error
        raise RegistryUnavailable(f"MLflow's files failed: {error}", where=uri, hint=COMPLETE_LATER) from error


def absent(error: Any) -> bool:
    """Whether an MlflowException says that the thing asked for does not exist."""
    return getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")


def local_artifacts(uri: str, model: str) -> str | None:
    """Where a model's artifacts go when MLflow is a sqlite file: beside it, whatever the current directory is.

    None leaves it to the server. MLflow's own default is relative to the directory of whoever comes first.
    """
    database = _sqlite_file(uri)
    return None if database is None else (database.parent / ".modelweld" / "mlflow" / model).as_uri()


def _ping(uri: str) -> None:
    # MLflow's own client retries for minutes before it admits that nobody is there.
    if uri.startswith(("http://", "https://")):
        import requests

        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=PING_TIMEOUT_S)
        except requests.exceptions.RequestException as error:
            raise RegistryUnavailable(
                f"no MLflow server answers: {type(error).__name__}", where=uri, hint=COMPLETE_LATER
            ) from error
    database = _sqlite_file(uri)
    if database is None:
        return
    if not database.parent.is_dir():
        raise RegistryUnavailable("the directory of MLflow's database is missing", where=uri, hint=COMPLETE_LATER)
    target = database if database.exists() else database.parent
    if not os.access(target, os.W_OK):
        raise RegistryUnavailable(f"{target} is not writable", where=uri, hint=COMPLETE_LATER)


def _sqlite_file(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix).split("?")[0]).resolve() if uri.startswith(prefix) else None
