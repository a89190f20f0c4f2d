"""Streams of samples that hosts share, so that batches do not depend on the hosts.

The rows of a batch are dealt to lanes; each lane draws, decodes and packs for itself.
A host makes the rows of some lanes, and it makes the same ones on whatever host it is:
a run that goes on with more hosts, or fewer, only deals the lanes anew.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import grain


def share(
    lanes: int, rows: int, *, process_index: int, process_count: int
) -> tuple[range, int]:
    """The lanes of this host, and how many of a batch's `rows` each makes."""
    if lanes % process_count:
        raise ValueError(
            f"lanes={lanes} do not divide among {process_count} hosts; use a multiple."
        )
    if rows % lanes:
        raise ValueError(
            f"batch_size={rows} does not divide among {lanes} lanes; use a multiple."
        )
    mine = lanes // process_count
    return range(process_index * mine, (process_index + 1) * mine), rows // lanes


class Lanes(grain.IterDataset[list[Any]]):
    """Some elements of each lane in turn; the lanes are by their number in the run."""

    def __init__(self, lanes: Mapping[int, grain.IterDataset], count: int):
        super().__init__(list(lanes.values()))
        self._numbers, self._count = [*lanes], count

    def __iter__(self) -> "_LanesIterator":
        return _LanesIterator(
            [iter(lane) for lane in self._parents], self._numbers, self._count
        )


class _LanesIterator(grain.DatasetIterator[list[Any]]):
    """Its state is that of each lane by number, whichever host has it."""

    def __init__(
        self, lanes: Sequence[grain.DatasetIterator], numbers: Sequence[int], count: int
    ):
        super().__init__(lanes)
        self._lanes = {
            str(number): lane for number, lane in zip(numbers, lanes, strict=True)
        }
        self._count = count

    def __next__(self) -> list[Any]:
        lanes = self._lanes.values()
        return [next(lane) for lane in lanes for _ in range(self._count)]

    def get_state(self) -> dict[str, Any]:
        return {name: lane.get_state() for name, lane in self._lanes.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        if missing := self._lanes.keys() - state.keys():
            raise ValueError(
                f"The input was saved in lanes {[*state]}, without {sorted(missing)};"
                " continue with the data.lanes it began with."
            )
        for name, lane in self._lanes.items():
            lane.set_state(state[name])


def dealt(
    states: Sequence[Mapping[str, Any]], index: int, count: int
) -> dict[str, Any]:
    """What host `index` of `count` goes on with, from the states that hosts saved.

    A state holds mappings by lane, and counts, which the first of other hosts takes
    over.
    """
    whole: dict[str, Any] = {}
    for name in states[0]:
        values = [state[name] for state in states]
        if isinstance(values[0], Mapping):
            whole[name] = {lane: one for value in values for lane, one in value.items()}
        elif len(states) == count:
            whole[name] = values[index]
        else:
            whole[name] = 0 if index else sum(values)
    return whole
