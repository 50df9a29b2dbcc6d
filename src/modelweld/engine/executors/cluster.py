"""A merge on a Ray cluster: one task per output shard, on a file system that all hosts share.

modelweld merge recipe.yaml /shared/merged --executor ray:10.0.0.1:6379
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from modelweld.engine.cost.memory import peak_resident
from modelweld.engine.executors.job import Made, Partition, WorkerJob, run_partition
from modelweld.engine.executors.placement import DevicePlacement, resolve_device
from modelweld.engine.output.shards import Output
from modelweld.engine.plan.inputs import Inputs
from modelweld.engine.plan.records import TensorPlan
from modelweld.engine.progress import Progress
from modelweld.errors import ConfigError, ExternalError

_ANSWER_S = 10.0
_HOSTS_LOST = 2  # how often a shard is retried after its host was lost


def run_on_cluster(
    outputs: Sequence[Output],
    inputs: Inputs,
    pending: Sequence[TensorPlan],
    placement: DevicePlacement,
    threads: int | None,
    memory_limit: int | None,
    progress: Progress,
) -> int:
    """Merge the pending tensors, one Ray task per shard. Returns the summed peak memory of the workers, in bytes.

    Each task has `threads` (by default its part of the cluster's cores) and may take `memory_limit`. The first error of
    any cancels the others and is raised here; ExternalError for a cluster that does not answer or gives a task up, and
    where what a task wrote has not arrived on this host.
    """
    shards: dict[str, list[TensorPlan]] = {}
    for tensor in pending:
        shards.setdefault(outputs[0].slots[tensor.name].file, []).append(tensor)
    peaks: dict[str, int] = {}
    with _cluster(placement.ray or "") as ray:
        each = threads or _cores(ray, len(shards))
        run = ray.remote(num_cpus=each, num_gpus=int(placement.kind == "cuda"), max_retries=_HOSTS_LOST)(_shard)
        payload = ray.put(pickle.dumps(WorkerJob.of(outputs, inputs)))
        running = {}
        for file, tensors in shards.items():
            names = frozenset(tensor.name for tensor in tensors)
            share = Partition(names, placement.devices[0], each, memory_limit, f"journal.{file}")
            running[run.options(name=f"merge {file}").remote(payload, share)] = tensors
        try:
            while running:
                for done in ray.wait(list(running))[0]:
                    made, worker, peak = ray.get(done)
                    for number, entry in made:
                        outputs[number].record(entry)
                    for tensor in running.pop(done):
                        progress.advance(tensor.read_bytes)
                        progress.finished(tensor.name)
                    peaks[worker] = peak
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
    for output in outputs:
        output.require_arrived(placement.threads_each(threads))
    return sum(peaks.values())


def _shard(payload: bytes, share: Partition) -> tuple[Made, str, int]:
    """The work of a Ray task: returns the records of its shard, its worker's id, and that worker's peak memory."""
    import ray

    task: WorkerJob = pickle.loads(payload)  # noqa: S301 - from the process that began this task
    # Two attempts at a shard may overlap when a host only seemed gone: each writes in a journal of its own.
    own = replace(share, device=resolve_device(str(share.device)), journal=f"{share.journal}.{uuid.uuid4().hex}")
    records = _Records()
    run_partition(task, own, records, sync=True)
    return records.entries, ray.get_runtime_context().get_worker_id(), peak_resident()


class _Records:
    """Collects the records until the task returns them."""

    def __init__(self) -> None:
        self.entries: Made = []

    def advance(self, size_bytes: int) -> None:
        """Shards are what is counted."""

    def made(self, tensor: str, entries: Made) -> None:
        """A tensor is written and journalled."""
        self.entries += entries


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected; shut down at the end if this merge connected it. Its errors become ModelweldErrors."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        # A cluster that is started here is for this host. So Ray calls, when it is imported, not listening to others.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed", where="executor", hint="pip install 'modelweld[ray]', on every host"
        ) from error
    ours = not ray.is_initialized()
    try:
        if ours:
            _connect(ray, address)
        yield ray
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ExternalError(
            f"Ray gave a task up: {' '.join(str(error).split())}",
            where="executor",
            hint="look at the cluster, and run the same command again: what was finished is kept",
        ) from error
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    how = {} if address else {"include_dashboard": False}
    host, colon, port = address.rpartition(":")
    try:
        if colon and "://" not in address and port.isdecimal():
            # Ray itself asks for minutes, aloud.
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
        ray.init(address or "local", logging_level=logging.ERROR, log_to_driver=False, **how)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExternalError(
            f"Ray does not answer: {' '.join(str(error).split())}",
            where=address or "executor",
            hint="`ray status` says what runs",
        ) from error


def _cores(ray: Any, tasks: int) -> int:
    """Cores for each of so many tasks: no more than one host has, or none could take it."""
    hosts = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min(max(hosts, default=1), sum(hosts) // tasks))
