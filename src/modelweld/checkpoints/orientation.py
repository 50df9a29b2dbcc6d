"""Which way round a weight is stored: (out, in) as linear layers do, or (in, out)."""

from __future__ import annotations

from modelweld.checkpoints.checkpoint import Checkpoint


def stored_transposed(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of weights that are stored (in, out), as GPT-2's Conv1D does, where a linear layer stores (out, in).

    Read off the biases: theirs is the output's length. A square weight goes with the rest of its model.
    """
    transposed, upright, square = set(), set(), set()
    for info in checkpoint.tensors.values():
        bias = checkpoint.tensors.get(info.name.removesuffix("weight") + "bias")
        if bias is None or len(info.shape) != 2 or not info.name.endswith(".weight") or len(bias.shape) != 1:
            continue
        rows, columns = info.shape
        if rows == columns == bias.shape[0]:
            square.add(info.name)
        elif bias.shape[0] == columns:
            transposed.add(info.name)
        elif bias.shape[0] == rows:
            upright.add(info.name)
    return frozenset(transposed | square if transposed and not upright else transposed)
