"""Pinning and fetching local sources: what is taken, what is refused, and what is left when something goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from modelweld.config import Params
from modelweld.errors import CheckpointError, DiskFull, SourceError
from modelweld.sources import Lock, PinnedFile, changes, fetch, pin, resolve
from modelweld.stages.fetch import fetch as stage


def model_at(path: Path, seed: int = 0, rows: int = 64) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(seed).standard_normal((rows, 64), dtype=np.float32)
    save_file({"encoder.weight": weights}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def params(base: str = "up/base", data: str = "up/data", **source: Any) -> Params:
    return Params.model_validate(
        {
            "name": "demo",
            "models": {"base": {"uri": base, **source}},
            "datasets": {"d": {"uri": data}},
            "tasks": {},
            "validate": {},
            "merge": {"method": "average"},
            "baselines": {},
            "evaluate": {},
        }
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    model_at(tmp_path / "up/base")
    (tmp_path / "up/data").mkdir()
    (tmp_path / "up/data/test.csv").write_text("text,label\nhello,0\n")
    return tmp_path


def digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_lock_names_every_file_with_its_digest(project: Path) -> None:
    lock = pin(params(), project)
    written = json.loads((project / "sources.lock.json").read_text())
    assert written["version"] == 1
    entry = written["pinned"]["model-base"]
    assert entry["resolved"] == "up/base"
    assert entry["path"] == "models/base"
    assert entry["revision"] is None
    assert entry["files"] == {
        name: {"sha256": digest, "size_bytes": (project / "up/base" / name).stat().st_size}
        for name, digest in digests(project / "up/base").items()
    }
    assert set(written["pinned"]) == {"dataset-d", "model-base"}
    assert Lock.read_if_present(project / "sources.lock.json") == lock


def test_pinning_twice_writes_the_same_bytes_and_leaves_the_file_alone(project: Path) -> None:
    lock = pin(params(), project)
    before = (project / "sources.lock.json").stat()
    assert pin(params(), project, lock) == lock
    after = (project / "sources.lock.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_lock_ends_in_a_newline_and_is_sorted(project: Path) -> None:
    text = pin(params(), project).to_json()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def test_a_file_address_and_a_path_pin_the_same_bytes(project: Path) -> None:
    by_path = resolve(params(), project).pinned["model-base"]
    by_url = resolve(params(base=(project / "up/base").as_uri()), project).pinned["model-base"]
    assert by_url.files == by_path.files
    assert by_url.resolved == by_path.resolved == "up/base"


def test_a_path_outside_the_project_stays_absolute(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = model_at(tmp_path_factory.mktemp("elsewhere"))
    assert resolve(params(base=str(elsewhere)), project).pinned["model-base"].resolved == elsewhere.as_posix()


def test_hidden_files_code_and_training_state_stay_behind(project: Path) -> None:
    source = project / "up/base"
    (source / ".cache").mkdir()
    (source / ".cache/x.json").write_text("{}")
    for name in ("modeling_evil.py", "training_args.bin", "model.onnx", "extra.pkl"):
        (source / name).write_bytes(b"x")
    entry = resolve(params(), project).pinned["model-base"]
    assert sorted(entry.files) == ["config.json", "model.safetensors"]
    assert sorted(entry.skipped) == ["extra.pkl", "model.onnx", "modeling_evil.py", "training_args.bin"]
    assert "code" in entry.skipped["modeling_evil.py"]


def test_licence_comes_from_params_else_from_the_card(project: Path) -> None:
    (project / "up/base/README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    assert resolve(params(), project).pinned["model-base"].licence == "apache-2.0"
    assert resolve(params(licence="mit"), project).pinned["model-base"].licence == "mit"
    assert resolve(params(), project).pinned["dataset-d"].licence is None


def test_a_single_file_is_a_dataset(project: Path) -> None:
    lock = pin(params(data="up/data/test.csv"), project)
    assert list(lock.pinned["dataset-d"].files) == ["test.csv"]
    fetch(lock.pinned["dataset-d"], project / "datasets/d", project)
    assert (project / "datasets/d/test.csv").read_text() == (project / "up/data/test.csv").read_text()


def test_fetch_copies_and_never_links(project: Path) -> None:
    os.chmod(project / "up/base/model.safetensors", 0o600)
    lock = pin(params(), project)
    done = fetch(lock.pinned["model-base"], project / "models/base", project)
    assert digests(project / "models/base") == digests(project / "up/base")
    assert done.transferred_bytes == done.size_bytes == lock.pinned["model-base"].size_bytes
    copy = (project / "models/base/model.safetensors").stat()
    assert copy.st_mode & 0o777 == 0o644
    assert copy.st_nlink == 1


def test_fetch_replaces_what_stands_at_the_destination(project: Path) -> None:
    lock = pin(params(), project)
    (project / "models/base").mkdir(parents=True)
    (project / "models/base/stale.json").write_text("{}")
    fetch(lock.pinned["model-base"], project / "models/base", project)
    assert digests(project / "models/base") == digests(project / "up/base")


def test_a_changed_upstream_is_seen_by_pin_and_refused_by_fetch(project: Path) -> None:
    lock = pin(params(), project)
    source = project / "up/base/model.safetensors"
    stat = source.stat()
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    source.write_bytes(content)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither size nor date gives it away
    with pytest.raises(SourceError, match="not what was pinned"):
        fetch(lock.pinned["model-base"], project / "models/base", project)
    assert not (project / "models/base").exists()
    assert not list((project / ".modelweld/staging").rglob("model.safetensors"))
    moved = {change.key: change for change in changes(lock, resolve(params(), project, lock))}
    assert (moved["model-base"].what, moved["model-base"].files_changed) == ("moved", 1)
    assert moved["dataset-d"].what == "same"


def test_an_interrupted_file_goes_on_and_a_damaged_one_starts_again(project: Path) -> None:
    entry = pin(params(), project).pinned["model-base"]
    source = (project / "up/base/model.safetensors").read_bytes()
    nowhere = PinnedFile(sha256="0" * 64, size_bytes=3)
    broken = entry.model_copy(update={"files": {**entry.files, "vanished.json": nowhere}})
    with pytest.raises(SourceError, match="no such file"):
        fetch(broken, project / "models/base", project)
    staged = next((project / ".modelweld/staging").glob("fetch-*"))
    for left in (source[:1000], b"\0" * 1000, b"\0" * len(source)):
        (staged / "model.safetensors").write_bytes(left)
        with pytest.raises(SourceError, match="no such file"):
            fetch(broken, project / "models/base", project)
        assert (staged / "model.safetensors").read_bytes() == source
    assert not (project / "models/base").exists()


SLOW = """
import sys, time
from modelweld.sources import local
from modelweld.cli import main
local.BLOCK_BYTES = 2**20
read = local.LocalPath.read
def slowly(self, *arguments):
    for block in read(self, *arguments):
        yield block
        time.sleep(0.02)
local.LocalPath.read = slowly
main(["stage", "fetch", "model-base"])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_in_the_middle_then_go_on(project: Path, how: signal.Signals) -> None:
    big = model_at(project / "up/base", rows=400_000)  # 102 MB
    entry = pin(params(), project).pinned["model-base"]
    child = subprocess.Popen([sys.executable, "-c", SLOW], cwd=project, stderr=subprocess.PIPE, text=True)
    arrived = 0
    while arrived < 5 * 2**20 and child.poll() is None:
        staged = list((project / ".modelweld/staging").glob("fetch-*/model.safetensors"))
        arrived = staged[0].stat().st_size if staged else 0
    child.send_signal(how)
    _, said = child.communicate(timeout=60)
    assert child.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), said
    assert ("what was finished is kept" in said) == (how == signal.SIGINT)
    assert not (project / "models/base").exists()
    done = fetch(entry, project / "models/base", project)
    assert done.kept_bytes >= 5 * 2**20
    assert done.transferred_bytes == done.size_bytes - done.kept_bytes
    assert digests(project / "models/base") == digests(big)


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside.json"])
def test_links_that_leave_the_directory_are_refused(project: Path, target: str) -> None:
    (project / "up/outside.json").write_text("{}")
    (project / "up/base/extra.json").symlink_to(target)
    with pytest.raises(SourceError, match="symbolic link"):
        resolve(params(), project)


def test_links_inside_the_directory_are_followed(project: Path) -> None:
    (project / "up/base/copy.json").symlink_to("config.json")
    lock = pin(params(), project)
    fetch(lock.pinned["model-base"], project / "models/base", project)
    assert not (project / "models/base/copy.json").is_symlink()
    assert (project / "models/base/copy.json").read_text() == "{}"


def test_a_pipe_in_the_directory_is_refused_and_not_waited_for(project: Path) -> None:
    os.mkfifo(project / "up/base/pipe")
    with pytest.raises(SourceError, match="neither a file nor a directory"):
        resolve(params(), project)


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:s3cret@example.com/m",
        "s3://AKIAEXAMPLE:s3cret@bucket/model",
        "https://bucket.example/model?X-Amz-Signature=s3cret",
        "https://example.com/m.csv?token=s3cret",
        "dvc://https://me:s3cret@git.example/repo@main:models/a",
        "hf://org/name@hf_s3cretabcdefghijklmnopqrstuv",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(project: Path, uri: str) -> None:
    with pytest.raises(SourceError, match="credentials") as caught:
        resolve(params(base=uri), project)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["../escape.json", "/etc/passwd", "a/../../b", "a\\b", "./a", "a\nb", ""])
def test_a_lock_cannot_write_outside_its_destination(project: Path, name: str) -> None:
    entry = pin(params(), project).pinned["model-base"]
    evil = entry.model_copy(update={"files": {name: PinnedFile(sha256="0" * 64, size_bytes=1)}})
    with pytest.raises(SourceError, match="unsafe file name"):
        fetch(evil, project / "models/base", project)
    assert not (project / "models/base").exists()


def test_a_missing_path_says_where_paths_start(project: Path) -> None:
    with pytest.raises(SourceError, match="no such file or directory") as caught:
        resolve(params(base="up/nothing"), project)
    assert caught.value.where == "models.base.uri"
    assert "project's root" in str(caught.value.hint)


def test_no_weights_and_no_data_are_said(project: Path) -> None:
    with pytest.raises(SourceError, match="no data files"):
        resolve(params(data="up/base"), project)
    (project / "up/base/model.safetensors").unlink()
    with pytest.raises(SourceError, match="no weights"):
        resolve(params(), project)


def test_pickled_weights_are_refused(project: Path) -> None:
    source = project / "up/base"
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pickled \(pytorch_model.bin\)") as caught:
        resolve(params(), project)
    assert "allow_pickle" in str(caught.value.hint)


def test_pickled_weights_are_rewritten_when_allowed(project: Path) -> None:
    import torch
    from safetensors.torch import load_file

    source = project / "up/base"
    (source / "model.safetensors").unlink()
    weights = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    torch.save({"a": weights["a"]}, source / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": weights["b"]}, source / "pytorch_model-00002-of-00002.bin")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    torch.save({"lr": 1}, source / "optimizer.pt")
    lock = pin(params(allow_pickle=True), project)
    fetch(lock.pinned["model-base"], project / "models/base", project)
    assert sorted(p.name for p in (project / "models/base").iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_file(project / "models/base/model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_code_in_a_pickle_is_not_run(project: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(project / "owned"),)

    source = project / "up/base"
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Evil()}))
    lock = pin(params(allow_pickle=True), project)
    with pytest.raises(CheckpointError):
        fetch(lock.pinned["model-base"], project / "models/base", project)
    assert not (project / "owned").exists()
    assert not (project / "models/base").exists()


def test_too_little_space_is_known_before_a_byte_moves(project: Path) -> None:
    entry = pin(params(), project).pinned["model-base"]
    vast = {**entry.files, "model.safetensors": PinnedFile(sha256="0" * 64, size_bytes=10**18)}
    with pytest.raises(DiskFull, match="bytes are needed") as caught:
        fetch(entry.model_copy(update={"files": vast}), project / "models/base", project)
    assert f"{10**18 + 2:,}" in caught.value.what
    assert not list((project / ".modelweld/staging").rglob("*.safetensors"))


def test_the_stage_reads_the_lock_of_its_own_root(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(params(), project)
    worktree = tmp_path_factory.mktemp("worktree")
    shutil.copy(project / "sources.lock.json", worktree)
    monkeypatch.setenv("MODELWELD_PROJECT_ROOT", str(project))
    summary = stage("model-base", worktree)
    assert summary["path"] == "models/base"
    assert digests(worktree / "models/base") == digests(project / "up/base")
    with pytest.raises(SourceError, match="no entry 'model-bass'"):
        stage("model-bass", worktree)


def test_the_stage_without_a_lock_says_pin(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        stage("model-base", tmp_path)
    assert "modelweld pin" in str(caught.value.hint)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2, "pinned": {}}', '{"version": 1}'])
def test_a_broken_lock_is_not_taken_for_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "sources.lock.json").write_text(text)
    with pytest.raises(SourceError, match="not a lock"):
        Lock.read_if_present(tmp_path / "sources.lock.json")


def test_changes_tell_new_gone_and_edited(project: Path) -> None:
    lock = resolve(params(), project)
    empty = Lock(pinned={})
    assert [change.what for change in changes(None, lock)] == ["new", "new"]
    assert [change.what for change in changes(lock, empty)] == ["gone", "gone"]
    assert [change.what for change in changes(lock, resolve(params(licence="mit"), project))] == ["same", "edited"]
    assert lock.write(project / "sources.lock.json")
    assert not lock.write(project / "sources.lock.json")


def modelweld(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "modelweld", *words], cwd=project, capture_output=True, text=True, check=False
    )


def test_the_command_pins_and_checks(project: Path) -> None:
    (project / "params.yaml").write_text(
        "name: demo\nmodels: {base: {uri: up/base}}\ndatasets: {d: {uri: up/data}}\n"
        "tasks: {}\nvalidate: {}\nmerge: {method: average}\nbaselines: {}\nevaluate: {}\n"
    )
    unpinned = modelweld(project, "pin", "--check")
    assert (unpinned.returncode, (project / "sources.lock.json").exists()) == (1, False)
    first = modelweld(project, "pin")
    assert first.returncode == 0, first.stderr
    assert "model-base" in first.stdout
    assert modelweld(project, "pin", "--check").returncode == 0
    (project / "up/data/test.csv").write_text("text,label\nbye,1\n")
    lock = (project / "sources.lock.json").read_bytes()
    moved = modelweld(project, "pin", "--check", "--json")
    assert moved.returncode == 1
    assert {s["key"]: s["what"] for s in json.loads(moved.stdout)["sources"]} == {
        "dataset-d": "moved",
        "model-base": "same",
    }
    assert (project / "sources.lock.json").read_bytes() == lock
    assert modelweld(project, "stage", "fetch", "dataset-d").returncode == 2


CHILD = "from pathlib import Path; from modelweld.sources import Lock, local, fetch; import sys\n"


def test_a_disk_that_fills_up_on_the_way(project: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no user namespaces here, so no small disk to fill")
    model_at(project / "up/base", rows=16_000)  # 4 MB
    pin(params(), project)
    (project / "small").mkdir()
    program = CHILD + (
        "read = local.LocalPath.read; from modelweld.errors import DiskFull\n"
        "local.BLOCK_BYTES = 2**20\n"
        "def crowd(*a, **k):\n"
        "    for block in read(*a, **k):\n"
        "        yield block\n"
        "        with open('small/other', 'ab') as other: other.write(bytes(2**20))\n"
        "local.LocalPath.read = crowd; lock = Lock.read_if_present(Path('sources.lock.json'))\n"
        "try: fetch(lock.pinned['model-base'], Path('small/models/base'), Path())\n"
        "except DiskFull as full: print(full, Path('small/models/base').exists())\n"
    )
    mounted = 'mount -t tmpfs -o size=6m none small && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted, sys.executable, program],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bytes are needed" in done.stdout
    assert "goes on where it stopped" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_a_read_only_disk_is_named(project: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no user namespaces here, so no read-only disk to mount")
    pin(params(), project)
    (project / "fixed").mkdir()
    program = CHILD + (
        "from modelweld.errors import WorkspaceError; lock = Lock.read_if_present(Path('sources.lock.json'))\n"
        "try: fetch(lock.pinned['model-base'], Path('fixed/models/base'), Path())\n"
        "except WorkspaceError as error: print(error.exit_code, error)\n"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o ro none fixed && exec "$0" -c "$1"', sys.executable, program],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 fixed/models: cannot be written: Read-only file system")


def test_a_file_that_became_a_pipe_is_not_waited_for(project: Path) -> None:
    entry = pin(params(), project).pinned["model-base"]
    (project / "up/base/model.safetensors").unlink()
    os.mkfifo(project / "up/base/model.safetensors")
    with pytest.raises(SourceError, match="no longer a file"):
        fetch(entry, project / "models/base", project)


def test_two_runs_that_fetch_the_same_source_at_once_both_get_it(project: Path) -> None:
    model_at(project / "up/base", rows=100_000)  # 26 MB
    pin(params(), project)
    program = CHILD + (
        "lock = Lock.read(Path('sources.lock.json'))\n"
        "fetch(lock.pinned['model-base'], Path(sys.argv[1]) / 'models/base', Path())"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, name], cwd=project) for name in ("one", "two")]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    for name in ("one", "two"):
        assert digests(project / name / "models/base") == digests(project / "up/base")


def test_a_source_longer_than_pinned_is_not_read_to_its_end(project: Path) -> None:
    entry = pin(params(), project).pinned["model-base"]
    short = PinnedFile(sha256="0" * 64, size_bytes=3)
    with pytest.raises(SourceError, match="not what was pinned"):
        fetch(entry.model_copy(update={"files": {"model.safetensors": short}}), project / "models/base", project)
    assert not list(project.glob(".modelweld/staging/*/*"))
