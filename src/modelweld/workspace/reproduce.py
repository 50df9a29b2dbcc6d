"""`dvc repro`, then `dvc checkout --relink` of what ran, in one process: starting DVC takes a second each time.

Run as a script in the worktree, `python -P reproduce.py WORDS`, with the words of `dvc repro`: so it imports DVC and
nothing of modelweld. Prints what DVC prints for it and ends with its exit code.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys

LOGGER = "dvc.stage.run"
RUNNING = re.compile(r"^Running stage '(?P<stage>[^']+)'")


class _Ran(logging.Handler):
    """Collects the stages that DVC says it runs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.stages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if match := RUNNING.match(record.getMessage()):
            self.stages.append(match["stage"])


def main(words: list[str]) -> int:
    """The exit code of `dvc repro WORDS`, or of the relinking when that failed."""
    from dvc.cli import main as dvc

    ran = _Ran()
    logging.getLogger(LOGGER).addHandler(ran)
    code: int = dvc(["repro", *words])
    if code or not ran.stages:
        return code
    # DVC leaves a second full copy of what a stage wrote; a link to the cache is enough.
    with contextlib.redirect_stdout(io.StringIO()):
        return int(dvc(["checkout", "--relink", *ran.stages]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
