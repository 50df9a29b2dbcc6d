"""Where a merge runs: the devices, with one process per device when there are several, or a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from modelweld.errors import ConfigError, MergeError


@dataclass(frozen=True)
class DevicePlacement:
    """The devices of a merge, and the Ray cluster's address when one makes it (empty: as Ray finds it).

    One device is this process' own; with several, each has a process. All are of one kind, so that the bytes do not
    depend on which of them made a tensor.
    """

    devices: tuple[torch.device, ...]
    ray: str | None = None

    @property
    def kind(self) -> str:
        """`cpu`, `cuda` or `mps`."""
        return self.devices[0].type

    def threads_each(self, threads: int | None) -> int:
        """Threads of each process on this machine, of `threads` in total; by default the cores there are."""
        return max(1, (threads or len(os.sched_getaffinity(0))) // len(self.devices))

    def limit_each(self, memory_limit: int | None) -> int | None:
        """What each process on this machine may take of `memory_limit`."""
        return None if memory_limit is None else memory_limit // len(self.devices)


def place(device: str, executor: str = "local") -> DevicePlacement:
    """The placement of `auto`, `cpu`, `cuda:1`, a list such as `cuda:0,cuda:1` or `cpu,cpu`, on `local` or `ray[:…]`.

    Raises MergeError for a device that this machine lacks, ConfigError for devices of two kinds, an executor that is
    not known, and several devices on Ray, which hands out its own.
    """
    name, colon, address = executor.partition(":")
    if name not in ("local", "ray") or (name == "local" and colon):
        raise ConfigError(f"no executor is called {executor!r}", where="executor", hint="local, ray or ray:ADDRESS")
    asked = [part.strip() for part in device.split(",")]
    if name == "ray":
        if len(asked) > 1 or ":" in device:
            raise ConfigError(
                f"Ray hands out devices itself, and {device} names some", where="device", hint="auto, cpu or cuda"
            )
        # The head of a GPU cluster need not have one: the tasks look for it where they run.
        return DevicePlacement((torch.device("cuda") if device == "cuda" else resolve_device(device),), address)
    devices = tuple(resolve_device(part) for part in asked)
    kinds = sorted({found.type for found in devices})
    if len(kinds) > 1:
        raise ConfigError(
            f"{device} mixes {' and '.join(kinds)}, which round differently",
            where="device",
            hint="name devices of one kind",
        )
    return DevicePlacement(devices)


def resolve_device(asked: str) -> torch.device:
    """The torch device that `auto`, `cpu`, `cuda[:i]` or `mps` stands for here; MergeError when there is none such."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise MergeError(f"no device is called {asked!r}", where="device", hint="auto, cpu, cuda[:i] or mps") from error
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise MergeError(f"this machine has no {asked}", where="device", hint="use `auto` or `cpu`")
    return device
