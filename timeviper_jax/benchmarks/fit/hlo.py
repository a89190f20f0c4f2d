"""What a compiled program exchanges between devices, read from its text.

Bytes are those that one device takes in during one run: the bodies of loops count as
often as they run, and of branches each as often as it is taken.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

# How often each branch is taken in one run of a loop, by the loop's iterations and its
# number of branches.
Shares = Mapping[tuple[int, int], Sequence[int]]

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf" ({_KINDS})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r" = [su]\d+\[\][^ ]* constant\((\d+)\)")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?([^,}\s]+)")
_WIDTHS = {"pred": 1, "token": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """A collective, the bytes a device takes in each time, and how often it runs.

    `loops` are the iterations of the loops that it stands in, the outermost first.
    """

    kind: str
    bytes: int
    times: int | float
    source: str
    loops: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchanges:
    """All of a program's; `exact` if it is known which branches are taken."""

    found: tuple[Exchange, ...]
    exact: bool

    @property
    def by_kind(self) -> dict[str, int]:
        total = collections.Counter()
        for one in self.found:
            total[one.kind] += one.bytes * one.times
        return {kind: round(size) for kind, size in total.most_common()}


def read(text: str, shares: Shares | None = None) -> Exchanges:
    """The exchanges of a program.

    Args:
      text: As the compiler writes a program.
      shares: Where it is not said how often branches are taken, the dearest counts.
    """
    return _Reader(text, shares or {}).run()


class _Reader:
    def __init__(self, text: str, shares: Shares):
        self._computations, self._entry = _computations(text)
        self._shares, self._exact = shares, True
        found = re.search(r"num_partitions=(\d+)", text)
        self._devices = int(found[1]) if found else 1

    def run(self) -> Exchanges:
        found = tuple(self._walk(self._entry, 1, ()))
        return Exchanges(found=found, exact=self._exact)

    def _walk(
        self, name: str, times: int | float, loops: tuple[int, ...]
    ) -> Iterator[Exchange]:
        """A computation that runs `times`, within loops of so many iterations."""
        for line in self._computations[name]:
            if found := _COLLECTIVE.search(line):
                yield self._exchange(name, line, found, times, loops)
            elif " while(" in line:
                number = self._iterations(line)
                for part in ("condition", "body"):
                    inner = _named(part, line)
                    yield from self._walk(inner, times * number, (*loops, number))
            elif " conditional(" in line:
                yield from self._conditional(line, times, loops)
            else:
                for called in _called(line):
                    if called in self._computations:
                        yield from self._walk(called, times, loops)

    def _conditional(
        self, line: str, times: int | float, loops: tuple[int, ...]
    ) -> Iterator[Exchange]:
        names, trips = _branches(line), loops[-1] if loops else 0
        shares = self._shares.get((trips, len(names)))
        if shares is not None:
            for name, taken in zip(names, shares, strict=True):
                yield from self._walk(name, times * taken / trips, loops)
            return
        branches = [list(self._walk(name, times, loops)) for name in names]
        sizes = [sum(one.bytes * one.times for one in branch) for branch in branches]
        self._exact &= len(set(sizes)) == 1
        yield from branches[sizes.index(max(sizes))]

    def _iterations(self, line: str) -> int:
        if found := _TRIPS.search(line):
            return int(found[1])
        # A loop that counts compares with the largest constant of its condition.
        condition = "\n".join(self._computations[_named("condition", line)])
        numbers = [int(number) for number in _CONSTANT.findall(condition)]
        self._exact &= bool(numbers)
        return max(numbers, default=1)

    def _exchange(
        self,
        name: str,
        line: str,
        found: re.Match,
        times: int | float,
        loops: tuple[int, ...],
    ) -> Exchange:
        kind, size = found[1], _bytes(line[: found.start()])
        group, started = self._group(line), bool(found[2])
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind, moved = "reduce-scatter", size * (group - 1) / group
        elif kind == "collective-permute":
            moved = size / 2 if started else size  # Operand and result.
        elif kind == "all-gather" and started:
            moved = size * (group - 1) / (group + 1)
        elif kind == "reduce-scatter":
            moved = size * (group - 1) / (group + 1 if started else 1)
        else:
            moved = size * (group - 1) / group * (2 if kind == "all-reduce" else 1)
        source = re.search(r'op_name="([^"]*)"', line)
        return Exchange(
            kind=kind,
            bytes=round(moved),
            times=times,
            source=source[1] if source else name,
            loops=loops,
        )

    def _group(self, line: str) -> int:
        """How many devices exchange with each other."""
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
            return int(found[1])
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
            return found[1].count(",") + 1
        if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            # A part of an axis says its own size: 'axis_0':(1)4.
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return self._devices


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that runs."""
    computations, entry, lines = {}, "", []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = computations[found[2]] = []
            entry = found[2] if found[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _named(part: str, line: str) -> str:
    return re.search(rf"\b{part}=%?([\w.\-]+)", line)[1]


def _called(line: str) -> list[str]:
    return [name.lstrip("%") for name in _CALLED.findall(line)]


def _branches(line: str) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", line):
        return [name.strip().lstrip("%") for name in found[1].split(",")]
    # Of a choice by a boolean the first branch is where it is false.
    return [_named(f"{which}_computation", line) for which in ("false", "true")]


def _bytes(text: str) -> int:
    """Of all arrays of a type; numbers that stand alone are marks of the runtime's."""
    sizes = [
        math.prod(map(int, sizes.split(","))) * _width(dtype)
        for dtype, sizes in _ARRAY.findall(text.partition(" = ")[2])
        if sizes
    ]
    return round(sum(sizes))


def _width(dtype: str) -> int | float:
    """Bytes of an element."""
    if dtype in _WIDTHS:
        return _WIDTHS[dtype]
    return int(re.search(r"\d+", dtype)[0]) / 8
