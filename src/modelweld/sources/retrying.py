"""Retries of what fails for a moment: the call again, or the rest of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

T = TypeVar("T")

ATTEMPTS = 4
_WAIT = wait_random_exponential(multiplier=0.5, max=8)

Transient = Callable[[BaseException], bool]


def with_retries(call: Callable[[], T], transient: Transient) -> T:
    """What `call` returns; a `transient` failure is retried three times, within about ten seconds."""

    def enough(state: RetryCallState) -> bool:
        return state.attempt_number >= ATTEMPTS

    return Retrying(retry=retry_if_exception(transient), wait=_WAIT, stop=enough, reraise=True)(call)


def resuming(open_at: Callable[[int], Iterator[bytes]], offset: int, transient: Transient) -> Iterator[bytes]:
    """The bytes that `open_at(offset)` yields; after a `transient` failure it is opened again where it broke off.

    Only failures without a byte between them count, so a long file may break as often as it likes.
    """
    fruitful = 0

    def enough(state: RetryCallState) -> bool:
        return state.attempt_number - fruitful >= ATTEMPTS

    for attempt in Retrying(retry=retry_if_exception(transient), wait=_WAIT, stop=enough, reraise=True):
        with attempt:
            for block in open_at(offset):
                fruitful = attempt.retry_state.attempt_number
                offset += len(block)
                yield block


def skip_prefix(prefix: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """`blocks` less their first `prefix` bytes, for a source that cannot start in the middle."""
    for block in blocks:
        if prefix < len(block):
            yield block[prefix:] if prefix else block
        prefix = max(0, prefix - len(block))
