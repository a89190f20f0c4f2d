r"""How published tensors and our parameters map onto each other, both ways.

A table of rules serves loading and writing alike. A rule's `name` is a pattern of
published names and its `path` says which parameter, using the pattern's groups:

    Rule(r"blocks\.(\d+)\.mlp\.fc1\.weight", r"blocks/up/kernel[\1]", "M D -> D M")

`[i]` addresses one layer of a stacked parameter. `axes` says in einops how the
published layout becomes ours; read from right to left it is the way back. A tensor may
match several rules, each of which takes its `cut`: a fused qkv fills q, k and v.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from einops import EinopsError, rearrange
from jaxtyping import Shaped

Shape = tuple[int, ...]

WHOLE = -1  # The layer of a parameter that is not addressed by layers.


class Cut(NamedTuple):
    """The part of a tensor from `start` to `stop` where all of its axis is `total`.

    A cut scales with the tensor: (1, 2, 3) is the second third, whatever the length.
    """

    start: int
    stop: int
    total: int
    axis: int = 0

    def slices(self, shape: Shape) -> tuple[slice, ...]:
        """What to index a tensor of this shape with."""
        length = shape[self.axis]
        if length % self.total:
            raise ValueError(f"axis {self.axis} does not divide by {self.total}")
        unit = length // self.total
        here = slice(self.start * unit, self.stop * unit)
        return (*[slice(None)] * self.axis, here)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table; `sizes` are of axes that einops cannot see by itself."""

    name: str
    path: str
    axes: str = "... -> ..."
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    cut: Cut | None = None

    def load(self, tensor: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The published tensor, or its part, in our layout. A view where possible."""
        part = tensor[self.cut.slices(tensor.shape)] if self.cut else tensor
        return rearrange(part, self.axes, **self.sizes)

    def save(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """`load` backwards: our array in the published layout, its part alone."""
        ours, theirs = reversed(self.axes.split("->"))
        return rearrange(array, f"{ours} -> {theirs}", **self.sizes)

    def address(self, name: str) -> tuple[str, int] | None:
        """The path and layer that the tensor of this name fills; None: not by this."""
        match = _compiled(self.name).fullmatch(name)
        if match is None:
            return None
        path, _, layer = match.expand(self.path).removesuffix("]").partition("[")
        return path, int(layer) if layer else WHOLE

    def names(self, address: str) -> str | None:
        """The published name of our `path[layer]`; None if the rule is another's."""
        pattern, template = _inverse(self.name, self.path)
        match = pattern.fullmatch(address)
        return match and match.expand(template)


class Placement(NamedTuple):
    """One tensor's part that fills one layer (or the whole) of one parameter."""

    name: str
    path: str
    layer: int
    rule: Rule


def place(
    shapes: Mapping[str, Shape],
    params: Mapping[str, Shape],
    rules: Sequence[Rule],
    *,
    ignore: Iterable[str] = (),
    keep: Iterable[str] = (),
    only: Iterable[str] = (),
    what: str = "the model",
) -> list[Placement]:
    """Where each published tensor goes, in the tensors' order; all misfits at once.

    Args:
      shapes: Of the published tensors, by name.
      params: Shapes of our parameters, by path.
      rules: How they map.
      ignore: Patterns of published names that are deliberately unused.
      keep: Patterns of parameter paths that may stay as they are.
      only: Patterns found in the paths that are to be filled; none is all.
      what: What the parameters are of, for the error.

    Raises:
      ValueError: It lists every name left over on either side and every shape that
        differs.
    """
    ignore, keep, only = tuple(ignore), tuple(keep), tuple(only)
    params = {path: shape for path, shape in params.items() if _wanted(only, path)}
    placements, problems = [], []
    for name, shape in shapes.items():
        if matches_any(ignore, name):
            continue
        found = [(rule, rule.address(name)) for rule in rules]
        found = [(rule, address) for rule, address in found if address]
        if not found:
            problems.append(f"{name} {shape}: no rule matches it")
        placements += [
            Placement(name, *address, rule)
            for rule, address in found
            if _wanted(only, address[0])
        ]
    by_path = defaultdict(list)
    for placement in placements:
        by_path[placement.path].append(placement)
    for path, fills in by_path.items():
        problems += _misfits(path, fills, shapes, params.get(path))
    problems += [
        f"{path} {shape}: no tensor fills it"
        for path, shape in params.items()
        if path not in by_path and not matches_any(keep, path)
    ]
    if problems:
        raise ValueError(
            f"{len(problems)} names do not fit {what}; mend the rules, or list what is"
            " deliberate in `ignore` or `keep`:\n  " + "\n  ".join(sorted(problems))
        )
    return placements


def _wanted(only: Sequence[str], path: str) -> bool:
    return not only or any(re.search(pattern, path) for pattern in only)


def _misfits(
    path: str,
    fills: Sequence[Placement],
    shapes: Mapping[str, Shape],
    shape: Shape | None,
) -> list[str]:
    """Names what keeps these tensors from making up a parameter of this shape."""
    if shape is None:
        return [f"{path}: the model has no such parameter ({fills[0].name} is for it)"]
    found, problems = {}, []
    for fill in fills:
        if fill.layer in found:
            where = f"{fill.name} {shapes[fill.name]}"
            problems.append(f"{where}: {path} is already filled")
        found[fill.layer] = fill
    if WHOLE in found:
        layers, want = {WHOLE}, shape
    else:
        layers, want = set(range(shape[0] if shape else 0)), shape[1:]
    problems += [f"{path}[{i}]: no tensor fills it" for i in sorted(layers - {*found})]
    problems += [f"{path}[{i}]: outside {shape}" for i in sorted({*found} - layers)]
    return problems + [
        problem
        for fill in found.values()
        if (problem := _wrong_shape(fill, shapes[fill.name], want))
    ]


def _wrong_shape(fill: Placement, shape: Shape, want: Shape) -> str | None:
    where = fill.path + ("" if fill.layer == WHOLE else f"[{fill.layer}]")
    try:  # Strides of zero: the shapes are worked out, and nothing is stored.
        got = fill.rule.load(np.broadcast_to(np.int8(0), shape)).shape
    except (EinopsError, ValueError, IndexError):
        return f"{where}: {fill.name} {shape} does not split as {fill.rule.axes!r}"
    if got == want:
        return None
    return f"{where}: got {got}, want {want} ({fill.name} is {shape})"


def write_plan(
    params: Mapping[str, Shape], rules: Sequence[Rule], *, what: str = "the model"
) -> dict[str, list[Placement]]:
    """The published tensors these parameters make, each with its parts in order.

    Raises:
      ValueError: It lists every parameter, or layer of one, that has no name, and every
        tensor of which a part is missing.
    """
    plan, problems = defaultdict(list), []
    for path, shape in params.items():
        layers = {WHOLE: _named(path, path, WHOLE, rules)}
        if not layers[WHOLE]:
            layers = {
                layer: _named(f"{path}[{layer}]", path, layer, rules)
                for layer in range(shape[0] if shape else 0)
            }
        if not any(layers.values()):
            problems.append(f"{path} {shape}: no rule names it")
            continue
        for layer, fills in layers.items():
            if not fills:
                problems.append(f"{path}[{layer}]: no rule names it")
            for fill in fills:
                plan[fill.name].append(fill)
    for name, fills in plan.items():
        fills.sort(key=lambda fill: fill.rule.cut or Cut(0, 1, 1))
        problems += _gaps(name, fills)
    if problems:
        raise ValueError(
            f"{len(problems)} names of {what} do not make whole published tensors:\n  "
            + "\n  ".join(sorted(problems))
        )
    return dict(plan)


def _named(
    address: str, path: str, layer: int, rules: Sequence[Rule]
) -> list[Placement]:
    return [
        Placement(name, path, layer, rule)
        for rule in rules
        if (name := rule.names(address))
    ]


def _gaps(name: str, fills: Sequence[Placement]) -> list[str]:
    """What is missing between the parts of one published tensor."""
    end, total = 0, 1
    for fill in fills:
        start, stop, total, _ = fill.rule.cut or Cut(0, 1, 1)
        if start != end:
            return [f"{name}: its part {end}..{start} of {total} is nowhere"]
        end = stop
    return [f"{name}: its part {end}..{total} is nowhere"] if end != total else []


def assemble(
    fills: Sequence[Placement], parts: Sequence[Shaped[np.ndarray, "..."]]
) -> Shaped[np.ndarray, "..."]:
    """One published tensor from its parts in our layout."""
    parts = [fill.rule.save(part) for fill, part in zip(fills, parts, strict=True)]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts, axis=fills[0].rule.cut.axis)


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns is of the whole name."""
    return any(_compiled(pattern).fullmatch(name) for pattern in patterns)


@functools.cache
def _compiled(pattern: str) -> re.Pattern:
    # A deep model has more patterns than `re` itself remembers.
    return re.compile(pattern)


@functools.cache
def _inverse(name: str, path: str) -> tuple[re.Pattern, str]:
    """A rule's path as a pattern, and its name as the template that goes with it.

    Names are made of characters, escaped ones and groups: nothing else has a way back.
    """
    pieces = re.split(r"(\([^()]*\))", name)
    groups = pieces[1::2]
    used = re.findall(r"\\(\d)", path)
    if sorted(used) != [str(i + 1) for i in range(len(groups))]:
        raise ValueError(f"{path!r} must use each group of {name!r} once.")
    literals = [re.sub(r"\\(.)", r"\1", piece) for piece in pieces[::2]]
    template = literals[0]
    for number, literal in enumerate(literals[1:], start=1):
        template += rf"\g<g{number}>{literal}"
    pattern = "".join(
        f"(?P<g{piece[1]}>{groups[int(piece[1]) - 1][1:-1]})"
        if re.fullmatch(r"\\\d", piece)
        else re.escape(piece)
        for piece in re.split(r"(\\\d)", path)
    )
    return re.compile(pattern), template
