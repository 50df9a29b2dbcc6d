"""git as the workspace needs it: run as git, quiet, without hooks, and refused as WorkspaceError."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from modelweld.errors import WorkspaceError

# A post-checkout hook of `dvc install` would check every model out into a worktree that wants none.
QUIET = ("-c", "core.hooksPath=/dev/null", "-c", "advice.detachedHead=false", "-c", "gc.auto=0")


def git(root: Path, *words: str, stdin: bytes | None = None, environment: Mapping[str, str] | None = None) -> bytes:
    """What `git <words>` printed; WorkspaceError in git's own words when it failed."""
    done = _run(root, words, stdin, environment)
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise WorkspaceError(f"git {words[0]} failed: {message}", where=str(root))
    return done.stdout


def line(root: Path, *words: str) -> str:
    """The one line `git <words>` printed."""
    return git(root, *words).decode().strip()


def try_git(root: Path, *words: str) -> str | None:
    """The one line `git <words>` printed; None when git knows no such thing."""
    done = _run(root, words, None, None)
    return done.stdout.decode().strip() if done.returncode == 0 else None


def read_file(root: Path, rev: str, path: str) -> bytes | None:
    """A file of `rev` below the folder `root`; None when `rev` does not hold it."""
    # `./` makes git resolve the path from the folder, which may lie below the repository's top.
    done = _run(root, ("show", f"{rev}:./{path}"), None, None)
    return done.stdout if done.returncode == 0 else None


def identity(root: Path) -> dict[str, str]:
    """Whose name a record carries: the user's where git knows one, else modelweld's own."""
    if try_git(root, "config", "user.email") or os.environ.get("GIT_COMMITTER_EMAIL"):
        return {}
    keys = [f"GIT_{role}_{part}" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")]
    return dict(zip(keys, ["modelweld", "modelweld@localhost"] * 2, strict=True))


def _run(
    root: Path, words: tuple[str, ...], stdin: bytes | None, environment: Mapping[str, str] | None
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(  # noqa: S603 - git itself, no shell, words of our own
            ["git", *QUIET, *words],  # noqa: S607 - the user's git, found as their shell finds it
            cwd=root,
            input=stdin if stdin is not None else b"",
            capture_output=True,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    except FileNotFoundError as error:
        what = "no such directory" if not root.exists() else "git is not installed"
        raise WorkspaceError(
            what, where=str(root), hint="name the project's directory, and have git on PATH"
        ) from error
