"""A PEFT adapter on its base, read as the whole model that the two make.

with Folded.onto("models/base", "adapters/sst2") as model:
    weight = model.read("bert.encoder.layer.0.attention.self.query.weight")
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from modelweld.checkpoints.adapter import CONFIG, WRAPPING, Adapter, is_adapter
from modelweld.checkpoints.buffers import bytes_of
from modelweld.checkpoints.checkpoint import Checkpoint, read_json
from modelweld.checkpoints.header import TensorInfo
from modelweld.errors import ConfigError

_HALVES = (torch.bfloat16, torch.float16)


class Folded(Checkpoint):
    """The model of an adapter and its base: tensors by that model's names, weights that are adapted made as read.

    With a head of the adapter's own it is the model of that task, else the base's. Adapted half-precision weights are
    float32, so that nothing of the delta is rounded away; `rounded` leaves them in the base's dtype, as PEFT's
    merge_and_unload() does. Not `adapted`, the backbone is the base's own, under the adapter's head.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint, *, rounded: bool = False, adapted: bool = True) -> None:
        self._adapter, self._base = adapter, base
        self._again = partial(type(self), rounded=rounded, adapted=adapted)
        self._stored: dict[str, str] = {}
        self._adapted: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        names = adapter.name_map
        for info in base.tensors.values():
            own = info.name
            if names.head:
                if not info.name.startswith(names.reference_prefix):
                    continue
                own = names.prefix + info.name.removeprefix(names.reference_prefix)
            if adapted and info.name in adapter.pairs:
                dtype = torch.float32 if info.dtype in _HALVES and not rounded else info.dtype
                self._adapted[own] = info.name
                tensors[own] = replace(info, name=own, dtype=dtype, nbytes=info.elements * dtype.itemsize)
            else:
                self._stored[own] = names.names[info.name] if adapted else info.name
                tensors[own] = replace(adapter.checkpoint.tensors[self._stored[own]], name=own)
        for stored in names.head:
            own = stored.removeprefix(WRAPPING)
            self._stored[own] = stored
            tensors[own] = replace(adapter.checkpoint.tensors[stored], name=own)
        super().__init__(adapter.checkpoint.path.parent, tensors, {})
        self._current = threading.local()

    @classmethod
    def onto(cls, base: str | Path | None, path: str | Path, *, rounded: bool = False, adapted: bool = True) -> Self:
        """The adapter in `path` on `base`; raises what `Adapter.open` raises, and ConfigError without a base."""
        if base is None:
            raise ConfigError("is an adapter, no model without its base", where=str(path), hint="name its base")
        with Checkpoint.open(base) as whole:
            return cls(Adapter.open(path, whole, str(path)), whole, rounded=rounded, adapted=adapted)

    def __reduce__(self) -> tuple[object, ...]:
        """For another process: adapter and base are opened there."""
        return self._again, (self._adapter, self._base)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json of the model: of the head's, where the adapter brings one, else the base's."""
        return self._adapter.config_on(self._base)

    @property
    def files(self) -> list[Path]:
        """The weight files of both."""
        return self._adapter.checkpoint.files

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on; an adapted weight is folded once a thread."""
        self._info(name)
        if name in self._stored:
            self._adapter.checkpoint.read_into(self._stored[name], start, buffer)
            return
        if getattr(self._current, "name", None) != name:
            # Let go of the last one first: two large weights need not be there at once.
            self._current.name, self._current.weight = None, None
            self._current.name, self._current.weight = name, self._folded(name)
        whole = bytes_of(self._current.weight)
        buffer[:] = whole[start : start + len(buffer)]

    def prefetch(self, name: str) -> None:
        """Tell the kernel that this tensor is read next."""
        self._adapter.checkpoint.prefetch(self._stored.get(name) or self._adapted[name])

    def close(self) -> None:
        """Close the files of both."""
        self._adapter.checkpoint.close()

    def _folded(self, name: str) -> Tensor:
        weight, read = self._adapted[name], self._adapter.checkpoint.read
        B, A = self._adapter.factors(weight, read)
        return (read(weight).double() + B @ A).to(self.tensors[name].dtype).contiguous()


def base_for(path: str | Path, named: str | Path | None, project: Path) -> Path | None:
    """What the adapter in `path` is folded into: the base that was named, else the project's, else its own config's.

    None for a whole model. Raises ConfigError when none of the three is a directory.
    """
    if not is_adapter(path):
        return None
    stated = read_json(Path(path) / CONFIG).get("base_model_name_or_path")
    candidates = [Path(named)] if named is not None else [project / "models" / "base"]
    candidates += [Path(stated)] if named is None and isinstance(stated, str) and stated else []
    found = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if found is None:
        raise ConfigError(
            f"is an adapter, and its base ({named or stated or 'which it does not name'}) is not here",
            where=str(path),
            hint="name the directory of its base: --base",
        )
    return found
