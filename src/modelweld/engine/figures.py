"""What a report says of a tensor, beside its digests: from the notes that a method has left, once they can be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from modelweld.methods.registry import Note

_DIGITS = 6


def joined(parts: Sequence[tuple[int, Mapping[str, Note]]]) -> dict[str, Note]:
    """The notes of a packed weight from those of its projections, each with its number of entries.

    Ranks add up, shares are averaged over the entries, directions that differ stand beside each other. Nothing is
    waited for.
    """
    found: dict[str, Note] = {}
    total = sum(entries for entries, _ in parts)
    for key in dict.fromkeys(key for _, notes in parts for key in notes):
        weighed = [(entries, notes[key]) for entries, notes in parts if key in notes]
        if all(isinstance(value, str) for _, value in weighed):
            found[key] = "/".join(dict.fromkeys(str(value) for _, value in weighed))
        elif key == "rank":
            found[key] = _sum(value for _, value in weighed)
        else:
            found[key] = _sum(value * (entries / total) for entries, value in weighed if not isinstance(value, str))
    return found


def figures(notes: Mapping[str, Note]) -> dict[str, float | int | str]:
    """The notes as plain values, which waits for the device they lie on."""
    return {key: _plain(value) for key, value in sorted(notes.items())}


def _sum(values: Iterable[Note]) -> Note:
    numbers = [value for value in values if not isinstance(value, str)]
    total = numbers[0]
    for value in numbers[1:]:
        total = total + value
    return total


def _plain(value: Note) -> float | int | str:
    plain = value.item() if isinstance(value, Tensor) else value
    return round(plain, _DIGITS) if isinstance(plain, float) else plain
