"""A sequence of layers as runs of a repeated unit, so that few bodies are compiled."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Repeats(NamedTuple):
    """The layers from `start` on that are a unit, `times` over."""

    start: int
    unit: tuple[str, ...]
    times: int


def find(kinds: Sequence[str]) -> tuple[Repeats, ...]:
    """The partition of a sequence whose units are, all together, the shortest."""
    kinds = tuple(kinds)

    @functools.cache
    def best(start: int) -> tuple[int, tuple[Repeats, ...]]:
        if start == len(kinds):
            return 0, ()
        options = []
        for found in _from(kinds, start):
            cost, rest = best(start + len(found.unit) * found.times)
            options.append((cost + len(found.unit), (found, *rest)))
        return min(options, key=lambda option: (option[0], len(option[1])))

    return best(0)[1]


def _from(kinds: tuple[str, ...], start: int) -> Iterator[Repeats]:
    """Each unit that may begin here, as often as it follows itself."""
    for size in range(1, len(kinds) - start + 1):
        unit = kinds[start : start + size]
        times = 1
        while kinds[start + times * size : start + (times + 1) * size] == unit:
            times += 1
        yield Repeats(start, unit, times)
        if times > 1:
            # What is left of the last may begin a better one.
            yield Repeats(start, unit, times - 1)
