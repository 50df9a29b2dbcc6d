"""Random numbers that depend on a key and an index alone: on no schedule, chunking, device or thread count.

Each index i of a stream has 16 uniform bits: a quarter of the 64-bit output i // 4 of SplitMix64 (Steele, Lea and
Flood, OOPSLA 2014) started from the key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blake3 import blake3
from torch import Tensor

N_LEVELS = 1 << 16  # values a draw can take
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_LANES = 4


def stream_keys(seed: int, tensor: str, experts: Sequence[str]) -> list[int]:
    """One key an expert, from the recipe's seed, the tensor's name and the expert's digest."""
    digests = (blake3("\0".join((str(seed), tensor, expert)).encode()).digest(8) for expert in experts)
    return [int.from_bytes(digest, "little", signed=True) for digest in digests]


def draws(key: int, offset: int, length: int, device: torch.device) -> Tensor:
    """`(length,)` int16, uniform over -N_LEVELS/2 … N_LEVELS/2 - 1: the stream from `offset` on."""
    first, last = offset // _LANES, -(-(offset + length) // _LANES)
    state = torch.arange(first + 1, last + 1, dtype=torch.int64, device=device)
    shifted = torch.empty_like(state)
    state.mul_(_signed(_GAMMA)).add_(key)
    _fold(state, 30, shifted)
    state.mul_(_signed(_MIX_1))
    _fold(state, 27, shifted)
    state.mul_(_signed(_MIX_2))
    _fold(state, 31, shifted)
    return state.view(torch.int16)[offset - first * _LANES :][:length]


def _fold(state: Tensor, bits: int, shifted: Tensor) -> None:
    # torch shifts signed integers arithmetically; the mask makes it the logical shift that SplitMix64 means.
    torch.bitwise_right_shift(state, bits, out=shifted)
    state.bitwise_xor_(shifted.bitwise_and_((1 << (64 - bits)) - 1))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
