"""What a report shows of a tensor beside its digests: a method's diagnostics, once they can be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from modelweld.methods.streaming import Metric

_DIGITS = 6


def combine(parts: Sequence[tuple[int, Mapping[str, Metric]]]) -> dict[str, Metric]:
    """The diagnostics of a packed weight from those of its projections, each with its number of entries.

    Ranks add up, shares are averaged over the entries, directions that differ stand beside each other. Nothing is
    waited for.
    """
    found: dict[str, Metric] = {}
    total = sum(entries for entries, _ in parts)
    for key in dict.fromkeys(key for _, diagnostics in parts for key in diagnostics):
        weighed = [(entries, diagnostics[key]) for entries, diagnostics in parts if key in diagnostics]
        if all(isinstance(value, str) for _, value in weighed):
            found[key] = "/".join(dict.fromkeys(str(value) for _, value in weighed))
        elif key == "rank":
            found[key] = _sum(value for _, value in weighed)
        else:
            found[key] = _sum(value * (entries / total) for entries, value in weighed if not isinstance(value, str))
    return found


def to_plain(diagnostics: Mapping[str, Metric]) -> dict[str, float | int | str]:
    """The diagnostics as plain values, which waits for the device they lie on."""
    return {key: _plain(value) for key, value in sorted(diagnostics.items())}


def _sum(values: Iterable[Metric]) -> Metric:
    numbers = [value for value in values if not isinstance(value, str)]
    total = numbers[0]
    for value in numbers[1:]:
        total = total + value
    return total


def _plain(value: Metric) -> float | int | str:
    plain = value.item() if isinstance(value, Tensor) else value
    return round(plain, _DIGITS) if isinstance(plain, float) else plain
