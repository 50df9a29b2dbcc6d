"""Pickled weights (`pytorch_model.bin`): read only on request, by torch's restricted unpickler, and rewritten."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from modelweld.errors import CheckpointError


def load_pickles(files: list[Path]) -> dict[str, tuple[Path, torch.Tensor]]:
    """Every tensor of the files with the file it came from; code in a pickle is refused, never run."""
    tensors: dict[str, tuple[Path, torch.Tensor]] = {}
    for file in files:
        if not file.is_file():  # reading a named pipe would wait for its writer
            raise CheckpointError("is missing, or not a regular file", where=str(file))
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"cannot be read as plain weights: {first}", where=str(file), hint="use a safetensors version"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError("does not hold a dictionary of tensors", where=str(file))
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointError(f"entry {name!r} is not a tensor", where=str(file))
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is also in {tensors[name][0].name}", where=str(file))
            tensors[name] = (file, tensor)
    return tensors


def rewrite_pickles(files: list[Path], out: Path) -> None:
    """Write the pickled tensors as one safetensors file at `out`; tied ones are written once, under the first name."""
    from safetensors.torch import save_file

    kept: dict[str, torch.Tensor] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, (_, tensor) in sorted(load_pickles(files).items()):
        # Two names of one storage are one tied weight; transformers ties them again when it loads.
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and key in seen:
            continue
        seen[key] = name
        kept[name] = tensor.clone().contiguous()
    save_file(kept, str(out), metadata={"format": "pt"})
