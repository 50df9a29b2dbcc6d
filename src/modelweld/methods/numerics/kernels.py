"""What methods do to every entry in host memory, in one pass of compiled loops over pieces that stay in a cache.

`stack` `(N, n)` are the experts' weights, `origin` `(n,)` the base's, or empty where no base is taken off. What happens
to an entry, and in which order, is as in the methods' own modules, so the results are equal to theirs.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from modelweld.compiling import compiled

Floats: TypeAlias = "NDArray[np.floating[Any]]"
Number: TypeAlias = "float | np.floating[Any]"

_PIECE = 2048  # entries of each model that are worked on at once: all of them stay in a first-level cache
_LANES = np.uint64(4)
_GAMMA, _MIX_1, _MIX_2 = (np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@compiled
def weigh(stack: Floats, origin: Floats, shares: Floats, merged: Floats) -> None:
    """Into `merged`: Σ c_i (W_i - base)."""
    scratch = np.empty(_PIECE, stack.dtype)
    for start in range(0, merged.size, _PIECE):
        stop = min(start + _PIECE, merged.size)
        total = merged[start:stop]
        total[:] = 0
        for index in range(len(stack)):
            delta = _delta(stack[index, start:stop], origin[start:stop], scratch[: stop - start])
            _add_scaled(delta, shares[index], total)


@compiled
def survey(
    stack: Floats, origin: Floats, low: Floats, high: Floats, sure: Floats, counts: NDArray[np.int64], unsure: Floats
) -> tuple[int, int]:
    """The votes of the entries that are certain to stay or to be trimmed, and how many are not.

    Magnitudes below `low` and below `high`, all `(N,)`, are counted in `counts` `(N, 2)`. From `sure` on they stay; in
    [low, sure) it is uncertain, and where any model's lies there the column goes to `unsure` `(N, n)`.
    """
    count = len(stack)
    deltas, totals = np.empty((count, _PIECE), stack.dtype), np.empty(_PIECE, stack.dtype)
    marks, places = np.empty(_PIECE, np.uint8), np.empty(_PIECE, np.int64)
    votes, found = 0, 0
    for start in range(0, origin.size, _PIECE):
        stop = min(start + _PIECE, origin.size)
        total, marked = totals[: stop - start], marks[: stop - start]
        total[:] = 0
        marked[:] = 0
        for index in range(count):
            delta = deltas[index, : stop - start]
            _subtract(stack[index, start:stop], origin[start:stop], delta)
            counts[index, 0] += _count_below(delta, low[index])
            counts[index, 1] += _count_below(delta, high[index])
            _mark_between(delta, low[index], sure[index], marked)
            _add_from(delta, sure[index], total)
        votes += _votes(total)
        for entry in places[: _place(marked, places)]:
            votes -= int(total[entry] > 0) - int(total[entry] < 0)
            for index in range(count):
                unsure[index, found] = deltas[index, entry]
            found += 1
    return votes, found


@compiled
def elect(
    stack: Floats, origin: Floats, cuts: Floats, shares: Floats, divisor: Number, vote: Number, merged: Floats
) -> tuple[int, int]:
    """Into `merged`: TIES' elected mean of what reaches the `cuts` `(N,)`; `divisor` 0 is the disjoint mean.

    Returns how many entries other than 0 reach a cut at 0, and how many that reach any agree with the elected sign.
    """
    count, nonzero, agreeing = len(stack), 0, 0
    kept, scratch = np.empty((count, _PIECE), stack.dtype), np.empty(_PIECE, stack.dtype)
    signs, voices = np.empty(_PIECE, stack.dtype), np.empty(_PIECE, stack.dtype)
    for start in range(0, merged.size, _PIECE):
        stop = min(start + _PIECE, merged.size)
        total = merged[start:stop]
        total[:] = 0
        for index in range(count):
            delta = _delta(stack[index, start:stop], origin[start:stop], scratch[: stop - start])
            row = kept[index, : stop - start]
            _keep_from(delta, cuts[index], row, total)
            if cuts[index] == 0:
                nonzero += _count_nonzero(row)
        agreeing += _agreed(kept, shares, divisor, vote, signs[: stop - start], voices[: stop - start], total)
    return nonzero, agreeing


@compiled
def elect_rows(
    directions: Floats, strengths: Floats, cut: Number, shares: Floats, divisor: Number, merged: Floats
) -> tuple[int, int]:
    """Into `merged` `(r, m)`: the elected mean of DRM's pruned rows `(N, r, m)`, each times its strength `(N, r)`.

    An entry whose direction reaches `cut` stays. Returns how many do that are not 0, and how many of them agree with
    the elected sign.
    """
    count, rows, length = directions.shape
    kept = np.empty((count, _PIECE), merged.dtype)
    signs, voices = np.empty(_PIECE, merged.dtype), np.empty(_PIECE, merged.dtype)
    nonzero, agreeing = 0, 0
    for row in range(rows):
        for start in range(0, length, _PIECE):
            stop = min(start + _PIECE, length)
            total = merged[row, start:stop]
            total[:] = 0
            for index in range(count):
                entries = kept[index, : stop - start]
                _keep_scaled(directions[index, row, start:stop], cut, strengths[index, row], entries, total)
                nonzero += _count_nonzero(entries)
            agreeing += _agreed(
                kept, shares, divisor, divisor * 0, signs[: stop - start], voices[: stop - start], total
            )
    return nonzero, agreeing


@compiled
def bracket(values: Floats, low: Number, high: Number, magnitudes: bool, inside: Floats) -> tuple[int, int]:
    """How many values (or magnitudes) are below `low`, and how many are in [low, high): these go to `inside`."""
    scratch, marks = np.empty(_PIECE, values.dtype), np.empty(_PIECE, np.uint8)
    places = np.empty(_PIECE, np.int64)
    below, found = 0, 0
    for start in range(0, values.size, _PIECE):
        stop = min(start + _PIECE, values.size)
        sizes, marked = scratch[: stop - start], marks[: stop - start]
        _take(values[start:stop], magnitudes, sizes)
        marked[:] = 0
        below += _count_less(sizes, low)
        _mark_inside(sizes, low, high, marked)
        for entry in places[: _place(marked, places)]:
            inside[found] = sizes[entry]
            found += 1
    return below, found


@compiled
def drop(
    stack: Floats,
    origin: Floats,
    keys: NDArray[np.uint64],
    offset: int,
    level: int,
    shares: Floats,
    elected: bool,
    merged: Floats,
) -> None:
    """Into `merged`: Σ c_i, or TIES' elected mean, of the task vectors' entries whose draw reaches `level`.

    The draws are those of `rng.draws` from `offset` on, which must be a multiple of 4.
    """
    count = len(stack)
    kept, scratch = np.empty((count, _PIECE), stack.dtype), np.empty(_PIECE, stack.dtype)
    states = np.empty(_PIECE // 4, np.uint64)
    draws = states.view(np.int16)
    signs, voices = np.empty(_PIECE, stack.dtype), np.empty(_PIECE, stack.dtype)
    divisor = stack.dtype.type(0)
    for start in range(0, merged.size, _PIECE):
        stop = min(start + _PIECE, merged.size)
        total = merged[start:stop]
        total[:] = 0
        for index in range(count):
            _draw(keys[index], np.uint64(offset + start) // _LANES, states)
            row = kept[index, : stop - start]
            delta = _delta(stack[index, start:stop], origin[start:stop], scratch[: stop - start])
            _keep_drawn(delta, draws[: stop - start], level, row)
            if elected:
                _add(row, total)
            else:
                _add_scaled(row, shares[index], total)
        if elected:
            _agreed(kept, shares, divisor, divisor, signs[: stop - start], voices[: stop - start], total)


@compiled
def _agreed(
    kept: Floats, shares: Floats, divisor: Number, vote: Number, sign: Floats, voices: Floats, total: Floats
) -> int:
    """From the sums of `kept` in `total` to the mean of those who agree with their sign; returns how many these are."""
    _elect_signs(total, vote, sign)
    voices[:] = 0
    agreeing = 0
    for index in range(len(kept)):
        row = kept[index, : total.size]
        _add_agreeing(row, sign, shares[index], total, voices)
        if shares[index] == 0:
            agreeing += _count_agreeing(row, sign)
    agreeing += _count_voices(voices)
    if divisor:
        voices[:] = divisor
    _divide(total, voices, sign)
    return agreeing


# One loop a function, whose arrays do not overlap: only such loops become vector instructions.


@compiled
def _delta(weights: Floats, origin: Floats, scratch: Floats) -> Floats:
    if origin.size == 0:
        return weights
    _subtract(weights, origin, scratch)
    return scratch


@compiled
def _subtract(weights: Floats, origin: Floats, delta: Floats) -> None:
    for entry in range(delta.size):
        delta[entry] = weights[entry] - origin[entry]


@compiled
def _add(delta: Floats, total: Floats) -> None:
    for entry in range(total.size):
        total[entry] += delta[entry]


@compiled
def _add_scaled(delta: Floats, share: Number, total: Floats) -> None:
    for entry in range(total.size):
        total[entry] += delta[entry] * share


@compiled
def _count_below(delta: Floats, low: Number) -> int:
    count = 0
    for entry in range(delta.size):
        count += abs(delta[entry]) < low
    return count


@compiled
def _mark_between(delta: Floats, low: Number, high: Number, marks: NDArray[np.uint8]) -> None:
    for entry in range(delta.size):
        size = abs(delta[entry])
        marks[entry] |= (size >= low) & (size < high)


@compiled
def _add_from(delta: Floats, cut: Number, total: Floats) -> None:
    zero = total.dtype.type(0)
    for entry in range(total.size):
        total[entry] += delta[entry] if abs(delta[entry]) >= cut else zero


@compiled
def _keep_from(delta: Floats, cut: Number, kept: Floats, total: Floats) -> None:
    zero = total.dtype.type(0)
    for entry in range(total.size):
        value = delta[entry] if abs(delta[entry]) >= cut else zero
        kept[entry] = value
        total[entry] += value


@compiled
def _keep_scaled(direction: Floats, cut: Number, strength: Number, kept: Floats, total: Floats) -> None:
    zero = total.dtype.type(0)
    for entry in range(total.size):
        value = direction[entry] * strength if abs(direction[entry]) >= cut else zero
        kept[entry] = value
        total[entry] += value


@compiled
def _take(values: Floats, magnitudes: bool, sizes: Floats) -> None:
    if magnitudes:
        for entry in range(sizes.size):
            sizes[entry] = abs(values[entry])
    else:
        for entry in range(sizes.size):
            sizes[entry] = values[entry]


@compiled
def _count_less(values: Floats, low: Number) -> int:
    count = 0
    for entry in range(values.size):
        count += values[entry] < low
    return count


@compiled
def _mark_inside(values: Floats, low: Number, high: Number, marks: NDArray[np.uint8]) -> None:
    for entry in range(values.size):
        marks[entry] |= (values[entry] >= low) & (values[entry] < high)


@compiled
def _keep_drawn(delta: Floats, draws: NDArray[np.int16], level: int, kept: Floats) -> None:
    zero = kept.dtype.type(0)
    for entry in range(kept.size):
        kept[entry] = delta[entry] if draws[entry] >= level else zero


@compiled
def _place(marks: NDArray[np.uint8], places: NDArray[np.int64]) -> int:
    """Where the marks are, into `places`; how many there are. Without a branch, which few marks would mislead."""
    found = 0
    for entry in range(marks.size):
        places[found] = entry
        found += marks[entry]
    return found


@compiled
def _votes(total: Floats) -> int:
    votes = 0
    for entry in range(total.size):
        votes += int(total[entry] > 0) - int(total[entry] < 0)
    return votes


@compiled
def _elect_signs(total: Floats, vote: Number, sign: Floats) -> None:
    zero, one = total.dtype.type(0), total.dtype.type(1)
    for entry in range(total.size):
        up = one if total[entry] > zero else zero
        down = one if total[entry] < zero else zero
        sign[entry] = up - down + (one - up - down) * vote
        total[entry] = zero


@compiled
def _add_agreeing(kept: Floats, sign: Floats, share: Number, total: Floats, voices: Floats) -> None:
    zero, one = total.dtype.type(0), total.dtype.type(1)
    voice = one if share != zero else zero
    for entry in range(total.size):
        value = kept[entry] * sign[entry]
        total[entry] += value * share if value > zero else zero
        voices[entry] += voice if value > zero else zero


# Counts of a piece are kept in 32 bits, of which a vector holds twice as many: Numba widens every sum.


@compiled
def _count_agreeing(kept: Floats, sign: Floats) -> int:
    count = np.int32(0)
    for entry in range(kept.size):
        count = np.int32(count + np.int32(kept[entry] * sign[entry] > 0))
    return int(count)


@compiled
def _count_nonzero(kept: Floats) -> int:
    count = np.int32(0)
    for entry in range(kept.size):
        count = np.int32(count + np.int32(kept[entry] != 0))
    return int(count)


@compiled
def _count_voices(voices: Floats) -> int:
    count = np.int32(0)
    for entry in range(voices.size):
        count = np.int32(count + np.int32(voices[entry]))
    return int(count)


@compiled
def _divide(total: Floats, voices: Floats, sign: Floats) -> None:
    one = total.dtype.type(1)
    for entry in range(total.size):
        total[entry] = total[entry] / (voices[entry] if voices[entry] > one else one) * sign[entry]


@compiled
def _draw(key: np.uint64, first: np.uint64, states: NDArray[np.uint64]) -> None:
    """SplitMix64's outputs from `first` on."""
    for number in range(states.size):
        state = (first + np.uint64(number) + np.uint64(1)) * _GAMMA + key
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        states[number] = state ^ (state >> np.uint64(31))
