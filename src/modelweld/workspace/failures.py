"""What a failed `dvc` process meant: the error that the stage reported, else DVC's own failure, told by its lines."""

from __future__ import annotations

import re
from collections.abc import Sequence

from modelweld.errors import (
    DiskFull,
    ExternalError,
    ModelweldError,
    RemoteUnavailable,
    WorkspaceError,
)
from modelweld.workspace.processes import ProcessResult
from modelweld.workspace.reproduce import RUNNING

EXITED = re.compile(r"ERROR: failed to reproduce '(?P<stage>[^']+)': failed to run: .*, exited with (?P<code>-?\d+)$")
# Advice that DVC prints for people at a terminal; in a log it hides the stage's own lines.
ADVICE = (
    "To track the changes with git",
    "To enable auto staging",
    "Use `dvc push`",
    "git add dvc.lock",
    "dvc config core.autostage",
    "Updating lock file",
    "Generating lock file",
)
ABSENT = re.compile(r"'(?P<path>[^']+)' does not exist as an output or a stage name")
SHOWN_LINES = 12
COMMAND_NOT_FOUND = (126, 127)
SIGNALLED = 128


class StageBusy(ExternalError):
    """Another DVC process works in the same workspace."""


def is_advice(line: str) -> bool:
    """Whether `line` is DVC's standing advice instead of something that happened."""
    return line.strip().startswith(ADVICE)


def of_stage(
    ended: ProcessResult, group: str, timeout_s: float | None, reported: ModelweldError | None = None
) -> ModelweldError:
    """The error that `dvc repro` of `group` ended with; `reported` is the one that the stage itself wrote."""
    text = "\n".join(ended.lines)
    if ended.timed_out:
        return ExternalError(
            f"not done after {timeout_s:g} s", where=f"stage {group}", hint="allow more time (--stage-timeout)"
        )
    for line in reversed(ended.lines):
        if match := EXITED.search(line):
            return _of_command(match["stage"], int(match["code"]), reported, ended.lines)
    if "is busy" in text or "Unable to acquire lock" in text:
        return StageBusy("DVC is busy in this workspace", where=f"stage {group}", hint="wait for the other run")
    return _of_dvc(text, ended, f"stage {group}")


def of_push(ended: ProcessResult) -> ModelweldError:
    """The error that `dvc push` ended with."""
    text = "\n".join(ended.lines)
    if "no remote specified" in text or "config file error" in text:
        return WorkspaceError(_last_errors(ended.lines), where=".dvc/config", hint="dvc remote add --default store URL")
    return RemoteUnavailable(
        f"the DVC remote did not take everything: {_last_errors(ended.lines)}", hint="see that it can be written"
    )


def _of_command(stage: str, code: int, reported: ModelweldError | None, lines: Sequence[str]) -> ModelweldError:
    """The error of a stage's command: what it reported, else what its exit code means, with its last lines."""
    where = f"stage {stage}"
    if code < 0 or code > SIGNALLED:
        number = -code if code < 0 else code - SIGNALLED
        return ExternalError(
            f"ended by signal {number}: {_last_lines(lines)}",
            where=where,
            hint="signal 9 is most often the memory: see `modelweld plan`",
        )
    if reported is not None:
        place = f"{where}: {reported.where}" if reported.where else where
        return type(reported)(reported.what, where=place, hint=reported.hint)
    if code in COMMAND_NOT_FOUND:
        return WorkspaceError(
            f"its command was not found: {_last_lines(lines)}",
            where=where,
            hint="install it in the environment that runs modelweld",
        )
    # A command of the project's own. Exit code 1 need not be a gate: it is also how an interpreter crashes.
    kind = ExternalError if code == ExternalError.exit_code else ModelweldError
    return kind(f"its command ended with exit code {code}: {_last_lines(lines)}", where=where)


def _of_dvc(text: str, ended: ProcessResult, where: str) -> ModelweldError:
    said = _last_errors(ended.lines)
    if match := ABSENT.search(text):
        return WorkspaceError(
            f"dvc.yaml needs {match['path']}, which no stage makes and the commit does not hold",
            where=where,
            hint=f"git add {match['path']} && git commit",
        )
    if "No space left on device" in text:
        return DiskFull(said, where=where, hint="free some space where .dvc/cache lies, then run again")
    if "failed to pull data" in text or "Checkout failed" in text or "missing cache files" in text.lower():
        return RemoteUnavailable(said, where=where, hint="see that the DVC remote can be read: `dvc remote list`")
    return WorkspaceError(f"DVC failed: {said}", where=where, hint="`dvc repro` by hand shows the same with -v")


def _last_lines(lines: Sequence[str]) -> str:
    """What the failed stage printed last: after DVC said that it runs, without DVC's own lines."""
    start = max((n for n, line in enumerate(lines) if RUNNING.match(line)), default=-1)
    own = [line for line in lines[start + 1 :] if not line.startswith(("ERROR: failed to reproduce", "> "))]
    return "\n".join([line for line in own if not is_advice(line)][-SHOWN_LINES:]) or "it printed nothing"


def _last_errors(lines: Sequence[str]) -> str:
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return "; ".join(errors[-3:]) or "\n".join(lines[-SHOWN_LINES:]) or "it printed nothing"
