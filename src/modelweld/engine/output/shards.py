"""A plan's directory being filled: its shards, its journal, what of it is there, and the way to the disk."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from blake3 import blake3

from modelweld.checkpoints.shards import Layout, ShardFile, Slot
from modelweld.engine.output.journal import Journal, TensorRecord, begun, recorded
from modelweld.engine.plan.records import Plan
from modelweld.errors import ExternalError

_BLOCK = 1 << 20


class Syncer:
    """A thread of its own that brings finished shards to the disk, while others are being made."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="modelweld-sync")
        self._syncs: list[Future[None]] = []

    def sync(self, shard: ShardFile) -> None:
        """Bring this shard to the disk, later."""
        self._syncs.append(self._pool.submit(shard.sync))

    def wait(self) -> None:
        """Wait until all are there; raises what the disk said."""
        for future in self._syncs:
            future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Output:
    """One plan's directory being filled, by the threads of one process.

    `resumed` is for the process that leads a merge: it lays the shards out and knows what an earlier attempt left.
    `joined` is for those that help: they fill in what is laid out already. Both stay open as long as `stack`.
    """

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        shards: dict[str, ShardFile],
        journal: Journal,
        finished: dict[str, TensorRecord],
    ) -> None:
        self.plan, self.directory, self.tree = plan, directory, directory / "tree"
        self.shards, self.journal, self.finished = shards, journal, finished
        self.slots = plan.layout.slots
        self.tensors = {tensor.name: tensor for tensor in plan.tensors}
        self.taken_over = len(finished)
        self._lock = threading.Lock()
        self._syncer: Syncer | None = None
        self._unfinished = Counter(self.slots[name].file for name in self.tensors if name not in finished)

    @classmethod
    def resumed(cls, plan: Plan, directory: Path, threads: int, stack: contextlib.ExitStack) -> Output:
        """The output with its shards reserved, and whatever is journalled and on disk as the journal says."""
        tree = directory / "tree"
        tree.mkdir(exist_ok=True)
        shards = stack.enter_context(_opened(plan.layout, tree, reserve=True))
        index = plan.layout.index()
        if index is not None:
            (tree / "model.safetensors.index.json").write_bytes(index)
        finished = _holding(recorded(directory).values(), plan.layout.slots, shards, threads)
        journal = stack.enter_context(begun(directory, finished.values()))
        return cls(plan, directory, shards, journal, finished)

    @classmethod
    def joined(
        cls,
        plan: Plan,
        directory: Path,
        finished: Mapping[str, TensorRecord],
        journal: str,
        stack: contextlib.ExitStack,
    ) -> Output:
        """The output as another process has laid it out and found it, with a journal of this one's own."""
        shards = stack.enter_context(_opened(plan.layout, directory / "tree", reserve=False))
        own = stack.enter_context(Journal(directory / journal))
        return cls(plan, directory, shards, own, dict(finished))

    def sync_with(self, syncer: Syncer) -> None:
        """Let every shard be brought to the disk once it is full: now those that are, the others as they fill."""
        self._syncer = syncer
        for file, shard in self.shards.items():
            if not self._unfinished[file]:
                syncer.sync(shard)

    def record(self, entry: TensorRecord) -> None:
        """Count a tensor as finished; the last one of a shard brings it to the disk."""
        file = self.slots[entry.tensor].file
        with self._lock:
            self.finished[entry.tensor] = entry
            self._unfinished[file] -= 1
            if self._syncer is not None and not self._unfinished[file]:
                self._syncer.sync(self.shards[file])

    def copy(self, entry: TensorRecord, made: Output) -> TensorRecord:
        """Take over a tensor that another output has just made in the same way."""
        source, target = made.slots[entry.tensor], self.slots[entry.tensor]
        buffer = memoryview(bytearray(min(_BLOCK, source.nbytes)))
        for start in range(0, source.nbytes, _BLOCK):
            part = buffer[: min(_BLOCK, source.nbytes - start)]
            made.shards[source.file].read_into(source, start, part)
            self.shards[target.file].write(target, start, part)
        return entry

    def require_arrived(self, threads: int) -> None:
        """Raise ExternalError unless the files here hold what other hosts say they wrote into them."""
        # A network file system shows what others wrote to those who open a file after it.
        with _opened(self.plan.layout, self.tree, reserve=False) as shards:
            there = _holding(self.finished.values(), self.slots, shards, threads)
        lacking = sorted(self.finished.keys() - there.keys())
        if lacking:
            raise ExternalError(
                f"{len(lacking)} tensors are not here as a task wrote them, first {lacking[0]}",
                where=str(self.tree),
                hint="put the output on a file system that all hosts share, at the same path, and run it again",
            )


@contextlib.contextmanager
def _opened(layout: Layout, tree: Path, *, reserve: bool) -> Iterator[dict[str, ShardFile]]:
    with contextlib.ExitStack() as stack:
        shards: dict[str, ShardFile] = {}
        for shard in layout.shards:
            shards[shard.file] = ShardFile(shard, tree, reserve=reserve)
            stack.callback(shards[shard.file].close)
        yield shards


def _holding(
    entries: Iterable[TensorRecord],
    slots: Mapping[str, Slot],
    shards: Mapping[str, ShardFile],
    threads: int,
) -> dict[str, TensorRecord]:
    """The entries whose bytes are on disk as they say."""

    def holds(entry: TensorRecord) -> bool:
        slot = slots[entry.tensor]
        hasher, buffer = blake3(), memoryview(bytearray(_BLOCK))
        for start in range(0, slot.nbytes, len(buffer)):
            part = buffer[: min(len(buffer), slot.nbytes - start)]
            if shards[slot.file].read_into(slot, start, part) != len(part):
                return False
            hasher.update(part)
        return hasher.hexdigest() == entry.digest

    known = [entry for entry in entries if entry.tensor in slots]
    with ThreadPoolExecutor(threads, thread_name_prefix="modelweld-verify") as pool:
        return {entry.tensor: entry for entry, good in zip(known, pool.map(holds, known), strict=True) if good}
