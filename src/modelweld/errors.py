"""Every error modelweld raises on purpose.

* ModelweldError
  + InputError                 exit 2: the caller can fix it
    - ConfigError              params.yaml or a recipe does not say what it must
    - SourceError              a source is missing, malformed or not what was pinned
    - CheckpointError          weights on disk are corrupt, unsafe or do not fit together
    - MergeError               this method cannot merge these tensors
    - WorkspaceError           git or DVC are not in the state a run needs
  + GateRefused                exit 1: a check said no; nothing is wrong with the machinery
  + ExternalError              exit 3: something outside failed; the same call may succeed later
    - SourceUnavailable        an upstream did not answer
    - RegistryUnavailable      MLflow did not answer
    - RemoteUnavailable        the DVC remote could not be read or written
    - DiskFull                 no space left where the output goes

Each says what went wrong, where (model, tensor, file or key) and how to fix it.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DiskFull",
    "ExternalError",
    "GateRefused",
    "InputError",
    "MergeError",
    "ModelweldError",
    "RegistryUnavailable",
    "RemoteUnavailable",
    "SourceError",
    "SourceUnavailable",
    "WorkspaceError",
]


class ModelweldError(Exception):
    """The root: `what` happened, `where` it happened, `hint` says what to do about it."""

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  hint: {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[object, ...]:
        # Prefect and multiprocessing pickle exceptions; keyword-only arguments do not survive the default.
        return _rebuild, (type(self), self.what, self.where, self.hint)


def _rebuild(kind: type[ModelweldError], what: str, where: str | None, hint: str | None) -> ModelweldError:
    return kind(what, where=where, hint=hint)


class InputError(ModelweldError):
    """The caller can fix it."""


class ConfigError(InputError):
    """params.yaml or a recipe does not say what it must."""


class SourceError(InputError):
    """A source is missing, malformed or not what was pinned."""


class CheckpointError(InputError):
    """Weights on disk are corrupt, unsafe or do not fit together."""


class MergeError(InputError):
    """This method cannot merge these tensors."""


class WorkspaceError(InputError):
    """git or DVC are not in the state a run needs."""


class GateRefused(ModelweldError):
    """A check said no; nothing is wrong with the machinery."""

    exit_code = 1


class ExternalError(ModelweldError):
    """Something outside failed; the same call may succeed later."""

    exit_code = 3


class SourceUnavailable(ExternalError):
    """An upstream did not answer."""


class RegistryUnavailable(ExternalError):
    """MLflow did not answer."""


class RemoteUnavailable(ExternalError):
    """The DVC remote could not be read or written."""


class DiskFull(ExternalError):
    """No space left where the output goes."""
