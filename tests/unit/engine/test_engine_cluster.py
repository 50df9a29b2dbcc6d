"""A merge on a Ray cluster: the bytes of a local one, its errors whole, and resumed like one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelweld.config import Recipe
from modelweld.engine.output.journal import TensorRecord
from modelweld.engine.output.shards import Output
from modelweld.errors import CheckpointError, ConfigError, ExternalError
from modelweld.stages.merge import merge
from tests.support.families import SHAPES, recipe, tree_bytes, weights_of, write_family
from tests.support.progress import Counted


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers on this host, which listen to nobody else."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'modelweld[ray]'")
    patch, terminate = pytest.MonkeyPatch(), signal.getsignal(signal.SIGTERM)
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()
    signal.signal(signal.SIGTERM, terminate)
    patch.undo()


def sharded(root: Path, method: str) -> Recipe:
    return recipe(root, method, output={"shard_bytes": 1_000_000})


def test_without_ray_or_a_cluster_the_way_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_family(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(ConfigError, match=r"pip install 'modelweld\[ray\]'"):
            merge(recipe(root, "average"), tmp_path / "out", executor="ray")
    pytest.importorskip("ray", reason="ray is not installed: pip install 'modelweld[ray]'")
    with pytest.raises(ExternalError, match="Ray does not answer"):
        merge(recipe(root, "average"), tmp_path / "out", executor="ray:127.0.0.1:1")
    assert not (tmp_path / "out").exists()


def test_bytes_that_other_hosts_wrote_must_have_arrived(tmp_path: Path) -> None:
    import contextlib

    from modelweld.engine import build, open_inputs

    root = write_family(tmp_path)
    with open_inputs(recipe(root, "average")) as inputs, contextlib.ExitStack() as stack:
        output = Output.resumed(build(recipe(root, "average"), inputs), tmp_path, 1, stack)
        output.record(TensorRecord("model.norm.weight", "0" * 64, {}))
        with pytest.raises(ExternalError, match=r"1 tensors are not here as a task wrote them, first model\.norm"):
            output.require_arrived(1)


@pytest.mark.slow
def test_the_command_starts_a_cluster_for_itself(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'modelweld[ray]'")
    root = write_family(tmp_path, dtype=torch.bfloat16)
    models = {f"e{i}": {"path": f"e{i}"} for i in range(3)}
    (root / "recipe.yaml").write_text(json.dumps({"method": "average", "base": "base", "models": models}))
    command = [sys.executable, "-m", "modelweld", "merge", "recipe.yaml", "out", "--executor", "ray", "--json"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, cwd=root, env=kept, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["merged"] == len(weights_of(root / "out"))


@pytest.mark.slow
def test_a_cluster_writes_the_bytes_of_one_process(tmp_path: Path, cluster: None) -> None:
    root = write_family(tmp_path, SHAPES)
    watched = Counted()
    merge(sharded(root, "drm"), tmp_path / "here")
    merge(sharded(root, "drm"), tmp_path / "there", executor="ray", progress=watched)
    assert len(list((tmp_path / "there").glob("*.safetensors"))) == 3
    assert tree_bytes(tmp_path / "here") == tree_bytes(tmp_path / "there")
    assert sorted(watched.tensors) == sorted(SHAPES)
    assert watched.read == watched.total


@pytest.mark.slow
def test_the_error_of_a_task_arrives_whole(tmp_path: Path, cluster: None) -> None:
    root = write_family(tmp_path, SHAPES)
    broken = weights_of(root / "e1")
    broken["model.layers.1.mlp.down_proj.weight"][3, 5] = float("inf")
    save_file(broken, root / "e1" / "model.safetensors")
    with pytest.raises(CheckpointError) as alone:
        merge(sharded(root, "ties"), tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        merge(sharded(root, "ties"), tmp_path / "out", executor="ray")
    assert (str(caught.value), caught.value.where) == (str(alone.value), alone.value.where)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cluster_goes_on_where_it_was(tmp_path: Path, cluster: None) -> None:
    root = write_family(tmp_path, SHAPES)

    class Stop(Exception):
        pass

    class Stopper(Counted):
        def finished(self, tensor: str) -> None:
            raise Stop

    with pytest.raises(Stop):
        merge(sharded(root, "drm"), tmp_path / "out", executor="ray", progress=Stopper())
    assert not (tmp_path / "out").exists()
    report = merge(sharded(root, "drm"), tmp_path / "out", executor="ray")
    assert report.resumed >= 1
    merge(sharded(root, "drm"), tmp_path / "undisturbed")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "undisturbed")
