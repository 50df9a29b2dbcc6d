"""What the tutorial of a first merge tells its reader to do works as it is written there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorials" / "first-merge.md"
FILE = re.compile(r'^```(?:python|yaml) title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
WORDS = {"python": [sys.executable], "modelweld": [sys.executable, "-m", "modelweld"]}


@pytest.mark.slow
def test_the_first_merge(tmp_path: Path) -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    for name, content in FILE.findall(text):
        (tmp_path / name).write_text(content, encoding="utf-8")
    shown = [line for block in CONSOLE.findall(text) for line in block.splitlines()]
    commands = [line.removeprefix("$ ") for line in shown if line.startswith("$ ")]
    output = "".join(run(command, tmp_path) for command in commands)
    assert len(commands) >= 5
    assert [line for line in shown if not line.startswith("$ ") and line not in output] == []
    assert (tmp_path / "merged" / "manifest.json").is_file()
    assert (tmp_path / "plain-model" / "model.safetensors").is_file()


def run(command: str, where: Path) -> str:
    first, *rest = shlex.split(command)
    done = subprocess.run(
        [*WORDS[first], *rest], cwd=where, env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout
