"""The matrix arithmetic of a program, counted in its jaxpr as often as it runs.

A compiler's own count takes the body of a loop once and sees into no Pallas kernel.
Here the jaxpr is walked: a scan's body counts once an iteration, a kernel's once a
point of its grid, a branch where it is taken. What decides (the table of a rolled
stack, the end of a loop, the tiles that splash attention visits) is computed on the
way, from constants of the program and from arguments whose values are given.

    traced = jax.jit(f).trace(x, used)
    flops.count(traced.jaxpr, [None, 4096])
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

# Values decide where the program goes; larger arrays are data.
_LARGEST_VALUE = 2**22  # Elements.
Value = np.ndarray | None  # None where it is not known.


class Count(NamedTuple):
    """Operations of matrix products and convolutions, two for a multiply and add.

    Where it is not known how often a loop runs it is counted once, and of branches the
    dearest: then the count is not `exact`.
    """

    flops: int
    exact: bool = True

    def __add__(self, other: "Count") -> "Count":
        return Count(self.flops + other.flops, self.exact and other.exact)

    def times(self, number: int) -> "Count":
        return Count(self.flops * number, self.exact or not number)


def count(
    jaxpr: ClosedJaxpr, values: Sequence[np.ndarray | int | None] | None = None
) -> Count:
    """What one run of a program counts, on each device if it is under `shard_map`.

    Args:
      jaxpr: Of `jax.jit(f).trace(...)` or `jax.make_jaxpr`.
      values: One for each flat argument, None for those that only are data.
    """
    values = values or [None] * len(jaxpr.in_avals)
    known = [None if value is None else np.asarray(value) for value in values]
    return _run(jaxpr, known)[0]


def _run(jaxpr: ClosedJaxpr, args: Sequence[Value]) -> tuple[Count, list[Value]]:
    """The count of a program, and which of its results are known."""
    consts = [_small(const) for const in jaxpr.consts]
    return _walk(jaxpr.jaxpr, [*consts, *args])


def _walk(jaxpr: Jaxpr, inputs: Sequence[Value]) -> tuple[Count, list[Value]]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))
    read = lambda v: _small(v.val) if isinstance(v, Literal) else values.get(v)
    total = Count(0)
    for eqn in jaxpr.eqns:
        added, results = _equation(eqn, [read(v) for v in eqn.invars])
        total += added
        values.update(zip(eqn.outvars, results, strict=True))
    return total, [read(v) for v in jaxpr.outvars]


def _small(value: Any) -> Value:
    """An array whose value is worth following."""
    small = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array))
    if not small or np.size(value) > _LARGEST_VALUE:
        return None
    return np.asarray(value)


def _equation(eqn: JaxprEqn, inputs: list[Value]) -> tuple[Count, list[Value]]:
    unknown = [None] * len(eqn.outvars)
    name = eqn.primitive.name
    if name in _LEAVES:
        return Count(_LEAVES[name](eqn)), unknown
    if name in _LOOPS:
        return _LOOPS[name](eqn, inputs)
    if name == "pallas_call":
        return _kernel(eqn, inputs), unknown
    if inner := _inner(eqn):
        # Within `shard_map` an array is a part of what it is outside.
        return _run(inner, [None] * len(inputs) if name == "shard_map" else inputs)
    if any(value is None for value in inputs) or eqn.effects or _placed(eqn):
        return Count(0), unknown
    if sum(math.prod(v.aval.shape) for v in eqn.outvars) > _LARGEST_VALUE:
        return Count(0), unknown
    return Count(0), _evaluated(eqn, inputs)


def _placed(eqn: JaxprEqn) -> bool:
    """Whether a value depends on where it is computed: on a mesh, or in a grid."""
    axes = jax.tree.leaves([eqn.params.get(key) for key in ("axis_name", "axes")])
    return any(isinstance(axis, str) for axis in axes) or eqn.primitive.name in (
        "program_id",
        "num_programs",
    )


def _evaluated(eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
    results = eqn.primitive.bind(*inputs, **eqn.params)
    results = results if eqn.primitive.multiple_results else [results]
    return [_small(result) for result in results]


def _inner(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The program that an equation only wraps, as `jit` and `checkpoint` do."""
    for name in ("jaxpr", "call_jaxpr"):
        inner = eqn.params.get(name)
        if isinstance(inner, Jaxpr) and not inner.constvars:
            inner = ClosedJaxpr(inner, ())
        if isinstance(inner, ClosedJaxpr):
            sizes = len(inner.jaxpr.invars), len(inner.jaxpr.outvars)
            if sizes == (len(eqn.invars), len(eqn.outvars)):
                return inner
    return None


# Arithmetic.


def _product(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    depth = math.prod(shape[axis] for axis in contracted)
    return 2 * math.prod(eqn.outvars[0].aval.shape) * depth


def _convolution(eqn: JaxprEqn) -> int:
    """Each output reads one kernel: its channels of a group, and its window."""
    kernel = eqn.invars[1].aval.shape
    outputs = eqn.params["dimension_numbers"].rhs_spec[0]
    depth = math.prod(kernel) // kernel[outputs]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * depth


_LEAVES: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
}


# Control.


def _scan(eqn: JaxprEqn, inputs: list[Value]) -> tuple[Count, list[Value]]:
    """Iterations differ where values that are known differ; like ones count alike."""
    consts, carried = _scan_split(eqn.params)
    fixed = inputs[:consts]
    carry, xs = inputs[consts : consts + carried], inputs[consts + carried :]
    total, seen = Count(0), {}
    length, backwards = eqn.params["length"], eqn.params["reverse"]
    for i in reversed(range(length)) if backwards else range(length):
        here = [*carry, *(x if x is None else np.asarray(x[i]) for x in xs)]
        key = tuple(None if value is None else value.tobytes() for value in here)
        if key not in seen:
            seen[key] = _run(eqn.params["jaxpr"], [*fixed, *here])
        added, results = seen[key]
        total += added
        carry = results[:carried]
    return total, [*carry, *[None] * (len(eqn.outvars) - carried)]


def _scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # JAX 0.12 on: a tree of its inputs as (constants, carry, slices).
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _while(eqn: JaxprEqn, inputs: list[Value]) -> tuple[Count, list[Value]]:
    """Iterations count alike; how many there are is found by running what decides."""
    params = eqn.params
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts = inputs[: split[0]], inputs[split[0] : split[1]]
    carry = inputs[split[1] :]
    once, _ = _run(params["body_jaxpr"], [*body_consts, *[None] * len(carry)])
    unknown = [None] * len(carry)
    decides, consts_used, control = _control(
        params["cond_jaxpr"], params["body_jaxpr"], params["body_nconsts"]
    )
    needed = [carry[i] for i in decides]
    fixed = [body_consts[i] for i in consts_used]
    if any(value is None for value in [*cond_consts, *fixed, *needed]):
        return Count(once.flops, False), unknown
    return once.times(int(control(cond_consts, fixed, needed))), unknown


@functools.lru_cache
def _control(
    cond: ClosedJaxpr, body: ClosedJaxpr, num_consts: int
) -> tuple[list[int], list[int], Callable]:
    """The part of a loop that decides how often it runs, and a function that runs it.

    Returns the indices of the carry and of the body's constants that it reads.
    """
    size = len(body.jaxpr.outvars)
    _, used = dce_jaxpr(cond.jaxpr, [True])
    needed = used[len(used) - size :]
    while True:
        part, used = dce_jaxpr(body.jaxpr, needed)
        wider = [a or b for a, b in zip(needed, used[num_consts:], strict=True)]
        if wider == needed:
            break
        needed = wider
    decides = [i for i, need in enumerate(needed) if need]
    consts_used = [i for i in range(num_consts) if used[i]]
    reads = [i for i in decides if used[num_consts + i]]
    test, step = jaxpr_as_fun(cond), jaxpr_as_fun(ClosedJaxpr(part, body.consts))

    @jax.jit
    def trips(cond_consts, body_consts, carry):
        def place(values):
            whole = [np.zeros(v.aval.shape, v.aval.dtype) for v in body.jaxpr.outvars]
            for i, value in zip(decides, values, strict=True):
                whole[i] = value
            return whole

        def more(state):
            return test(*cond_consts, *place(state[1]))[0]

        def advance(state):
            number, values = state
            whole = place(values)
            return number + 1, step(*body_consts, *(whole[i] for i in reads))

        return jax.lax.while_loop(more, advance, (0, carry))[0]

    return decides, consts_used, trips


def _cond(eqn: JaxprEqn, inputs: list[Value]) -> tuple[Count, list[Value]]:
    """The branch that is taken, or the dearest if it is not known which is."""
    index, *operands = inputs
    branches = eqn.params["branches"]
    if index is not None:
        branch = branches[int(np.clip(index, 0, len(branches) - 1))]
        found = _whatever_comes(branch)
        if found.flops and found.exact:
            # Most layers: nothing that is known decides, and walking takes time.
            places = dict(zip(branch.jaxpr.invars, operands, strict=True))
            is_input = lambda v: not isinstance(v, Literal) and v in places
            outputs = branch.jaxpr.outvars
            return found, [places[v] if is_input(v) else None for v in outputs]
        return _run(branch, operands)
    counts = [_run(branch, operands)[0] for branch in branches]
    same = len({found.flops for found in counts}) == 1
    dearest = max(counts)
    return Count(dearest.flops, same and dearest.exact), [None] * len(eqn.outvars)


@functools.lru_cache
def _whatever_comes(jaxpr: ClosedJaxpr) -> Count:
    return _run(jaxpr, [None] * len(jaxpr.in_avals))[0]


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


# Kernels.


def _kernel(eqn: JaxprEqn, inputs: list[Value]) -> Count:
    """A kernel's body at every point of its grid, or where splash's table sends it."""
    kernel = eqn.params["jaxpr"]
    body, _ = _walk(kernel, [None] * len(kernel.invars))
    points = math.prod(eqn.params["grid_mapping"].grid)
    splash = (eqn.params["name"] or "").startswith("splash_")
    tiles = inputs[_SPLASH_TILES] if splash else None
    if tiles is None:
        return body.times(points)
    return Count(body.flops * (points * int(np.count_nonzero(tiles)) // tiles.size))


# The place among the kernel's arguments of the table that says which tiles to visit.
_SPLASH_TILES = 1
