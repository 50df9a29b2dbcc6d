"""Several processes at one merge: the bytes of one, and nothing lost or left behind however any of them ends."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelweld.checkpoints import Checkpoint
from modelweld.config import load_recipe
from modelweld.engine import build, open_inputs, place
from modelweld.engine.executors.job import Failure
from modelweld.engine.executors.partition import partition
from modelweld.errors import CheckpointError, ConfigError, MergeError
from modelweld.lineage import manifest
from modelweld.stages.grid import merge_grid
from modelweld.stages.merge import merge
from modelweld.stages.plan import plan
from tests.support.families import LLAMA_SHAPES, SHAPES, recipe, tree_bytes, weights_of, write_family
from tests.support.progress import Counted


@pytest.mark.parametrize("method", ["drm", "dare"])
def test_two_processes_write_the_bytes_of_one(tmp_path: Path, method: str) -> None:
    root = write_family(tmp_path, SHAPES, dtype=torch.bfloat16)
    asked = recipe(root, method, output={"shard_bytes": 1_000_000})
    watched = Counted()
    merge(asked, tmp_path / "one", "cpu", threads=2)
    merge(asked, tmp_path / "two", "cpu,cpu", threads=2, progress=watched)
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")
    assert sorted(watched.tensors) == sorted(SHAPES)
    assert watched.read == watched.total


def test_a_grid_in_two_processes_is_the_grid_of_one(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    axes = {"drop_rate": [0.5, 0.9]}
    one = merge_grid(recipe(root, "drm"), axes, tmp_path / "one")
    merge_grid(recipe(root, "drm"), axes, tmp_path / "two", "cpu,cpu")
    for key in one:
        assert tree_bytes(tmp_path / "one" / key) == tree_bytes(tmp_path / "two" / key)


def test_the_error_of_a_process_arrives_whole(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    broken = weights_of(root / "e1")
    broken["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(broken, root / "e1" / "model.safetensors")
    with pytest.raises(CheckpointError) as alone:
        merge(recipe(root, "drm"), tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        merge(recipe(root, "drm"), tmp_path / "out", "cpu,cpu")
    assert str(caught.value) == str(alone.value)
    assert caught.value.hint is not None
    assert "require_finite" in str(caught.value.__cause__), "--debug shows where in the other process it came from"
    assert not (tmp_path / "out").exists()
    assert not helpers_of(os.getpid())


def test_an_error_that_cannot_be_pickled_still_says_what_happened() -> None:
    class Local(Exception):
        pass

    with pytest.raises(RuntimeError, match="Local: the matter") as caught:
        pickle.loads(pickle.dumps(Failure.of(Local("the matter")))).reraise()  # noqa: S301
    assert "Local: the matter" in str(caught.value.__cause__)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose merge takes a while, and that merge, undisturbed."""
    root = tmp_path_factory.mktemp("slow")
    shapes = {f"model.layers.{i}.mlp.down_proj.weight": (500, 500) for i in range(24)}
    write_family(root, shapes, dtype=torch.bfloat16)
    models = {f"e{i}": {"path": f"e{i}"} for i in range(3)}
    (root / "recipe.yaml").write_text(json.dumps({"method": "drm", "base": "base", "models": models}))
    merge(load_recipe(root / "recipe.yaml"), root / "undisturbed", threads=2)
    return root


def helpers_of(pid: int) -> list[int]:
    """The processes that `pid` has started to help it merge, by Linux' own account."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_bytes()
        except (OSError, ProcessLookupError):
            continue
        if parent == pid and b"spawn_main" in command:
            found.append(int(status.parent.name))
    return found


def wait_until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"waited a minute until {what}"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in Linux' /proc")
@pytest.mark.parametrize("ending", ["worker killed", "coordinator killed", "interrupted"])
def test_however_a_process_ends_nothing_is_lost_or_left_behind(tmp_path: Path, slow: Path, ending: str) -> None:
    out = str(tmp_path / "out")
    command = [sys.executable, "-m", "modelweld", "merge", "recipe.yaml", out, "--device", "cpu,cpu"]
    coordinator = subprocess.Popen(command, cwd=slow, stderr=subprocess.PIPE, text=True, start_new_session=True)
    journals = tmp_path / ".modelweld-staging"
    wait_until(lambda: any(f.stat().st_size for f in journals.glob("*/journal.[12]")), "a worker had made a tensor")
    workers = helpers_of(coordinator.pid)
    assert len(workers) == 2
    if ending == "worker killed":
        os.kill(workers[0], signal.SIGKILL)
    elif ending == "coordinator killed":
        coordinator.kill()
    else:
        os.killpg(coordinator.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, words = coordinator.communicate(timeout=60)
    wait_until(lambda: all(map(gone, workers)), "the workers were gone")
    if ending == "worker killed":
        assert coordinator.returncode == 3
        assert "the process on cpu was ended by SIGKILL before its partition was finished" in words
        assert "what was finished is kept" in words
    elif ending == "interrupted":
        assert coordinator.returncode == 130
    assert "Traceback" not in words
    assert not (tmp_path / "out").exists()
    report = merge(load_recipe(slow / "recipe.yaml"), tmp_path / "out", threads=2)
    assert 0 < report.resumed < 24
    assert tree_bytes(tmp_path / "out") == tree_bytes(slow / "undisturbed")
    assert not journals.exists()


def test_processes_go_on_where_one_was(tmp_path: Path) -> None:
    root = write_family(tmp_path)

    class Stop(Exception):
        pass

    class Stopper(Counted):
        def finished(self, tensor: str) -> None:
            super().finished(tensor)
            if len(self.tensors) == 3:
                raise Stop

    for device in ("cpu", "cpu,cpu"):
        with pytest.raises(Stop):
            merge(recipe(root, "drm"), tmp_path / "out", device, threads=2, progress=Stopper())
    report = merge(recipe(root, "drm"), tmp_path / "out", "cpu,cpu")
    assert report.resumed >= 3
    assert manifest.verify(tmp_path / "out") == []


def test_shares_are_balanced_complete_and_always_the_same(tmp_path: Path) -> None:
    root = write_family(tmp_path, {f"model.layers.{i}.mlp.down_proj.weight": (8 + i, 16) for i in range(30)})
    with open_inputs(recipe(root, "drm")) as inputs:
        tensors = build(recipe(root, "drm"), inputs).tensors
    for count in (1, 2, 3, 7, 40):
        cut = partition(tensors, 3, count)
        assert len(cut) == min(count, len(tensors))
        assert all(cut)
        assert sorted(t.name for share in cut for t in share) == sorted(t.name for t in tensors)
        assert all(share == [t for t in tensors if t in share] for share in cut), "in the order of the files"
        assert cut == partition(tensors, 3, count)
    sizes = [sum(t.read_bytes for t in share) for share in partition(tensors, 3, 3)]
    assert max(sizes) < 1.1 * min(sizes)
    assert partition([], 3, 2) == []


def test_devices_and_executors_that_cannot_be_are_refused() -> None:
    assert [str(device) for device in place("cpu, cpu").devices] == ["cpu", "cpu"]
    assert place("cpu", "ray:10.0.0.1:6379").ray == "10.0.0.1:6379"
    assert place("cuda", "ray").kind == "cuda", "the host that leads need not have a GPU"
    with pytest.raises(MergeError, match="no cuda:7"):
        place("cpu,cuda:7")
    with pytest.raises(MergeError, match="no device is called ''"):
        place("cpu,")
    with pytest.raises(ConfigError, match="no executor is called 'dask'"):
        place("cpu", "dask")
    with pytest.raises(ConfigError, match="Ray hands out devices itself"):
        place("cpu,cpu", "ray")


def test_the_processes_share_threads_and_memory(tmp_path: Path) -> None:
    placement = place("cpu,cpu")
    assert (placement.threads_each(8), placement.threads_each(1)) == (4, 1)
    assert (placement.limit_each(None), placement.limit_each(1000)) == (None, 500)
    root = write_family(tmp_path)
    with pytest.raises(MergeError, match="the limit is"):
        merge(recipe(root, "drm"), tmp_path / "out", "cpu,cpu", memory_limit=20_000_000)
    assert merge(recipe(root, "drm"), tmp_path / "out", "cpu", memory_limit=20_000_000).merged == len(LLAMA_SHAPES)


def test_a_checkpoint_opens_again_where_it_lands_unless_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_family(tmp_path)
    monkeypatch.chdir(root)
    with Checkpoint.open("base") as original:
        sent = pickle.dumps(original)
        monkeypatch.chdir("/")
        with pickle.loads(sent) as landed:  # noqa: S301
            for name in original.tensors:
                assert torch.equal(landed.read(name), original.read(name))
            assert landed.path == original.path
        os.utime(root / "base" / "model.safetensors", ns=(1, 1))
        with pytest.raises(CheckpointError, match="has changed since the merge began"):
            pickle.loads(sent)  # noqa: S301


def test_a_plan_prices_every_process(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    one = plan(recipe(root, "drm"), tmp_path / "out", "cpu", threads=2)
    two = plan(recipe(root, "drm"), tmp_path / "out", "cpu,cpu", threads=2)
    assert (one.threads, two.threads) == (2, 2)
    assert two.device == "cpu,cpu"
    assert two.memory_bytes > 1.5 * one.memory_bytes, "each process has its own interpreter and buffers"
