"""A stack of layers as one loop that keeps only what enters each layer.

The backward pass runs every layer again, and writes its parameters' gradients to their
place in the stack: left to itself, the loop would add a whole stack of mostly zeros for
each layer. Parameters that stand still get none.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from timeviper_jax.layers.layout import Layout

Params = Mapping[Any, Array]
Layers = tuple[tuple[str, int], ...]
Mixer = Callable[[Params, Float[Array, "B T D"], Layout], Float[Array, "B T D"]]


def run(
    mixers: Mapping[str, Mixer],
    layers: Layers,
    stacks: Mapping[str, Params],
    x: Float[Array, "B T D"],
    layout: Layout,
) -> Float[Array, "B T D"]:
    """`x` after these layers, each of which adds what its mixer makes of it.

    A layer is (kind, number in its stack), and those of a kind follow each other in
    their stack, whose arrays have a leading axis of layers.
    """
    arrays, tree = jax.tree.flatten(layout)
    call = _Call(tuple(mixers.items()), layers, tree)
    return _run(call, stacks, x, arrays)


class _Call(NamedTuple):
    """What is known when a program is compiled."""

    mixers: tuple[tuple[str, Mixer], ...]
    layers: Layers
    layout: jax.tree_util.PyTreeDef

    @property
    def table(self) -> Int[Array, "layers 2"]:
        kinds = [kind for kind, _ in self.mixers]
        table = [(kinds.index(kind), i) for kind, i in self.layers]
        return jnp.array(table, jnp.int32)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Moving:
    """Which parameters have a gradient, for each kind."""

    paths: Mapping[str, tuple]

    def __hash__(self):
        return hash(tuple(self.paths.items()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(call, stacks, x, layout):
    return _scan(call, stacks, x, layout)[0]


def _forward(call, stacks, x, layout):
    moving = {
        kind: tuple(path for path, array in stack.items() if array.perturbed)
        for kind, stack in stacks.items()
    }
    stacks, x, layout = jax.tree.map(lambda z: z.value, (stacks, x, layout))
    x, entering = _scan(call, stacks, x, layout)
    return x, (stacks, entering, layout, _Moving(moving))


def _scan(call, stacks, x, layout):
    """What leaves the last layer, and what entered each."""
    layout = jax.tree.unflatten(call.layout, layout)

    def branch(kind, mixer):
        return lambda i, x: mixer(_layer(stacks[kind], i), x, layout)

    branches = [branch(*item) for item in call.mixers]
    step = lambda x, layer: (x + lax.switch(layer[0], branches, layer[1], x), x)
    return lax.scan(step, x, call.table)


def _backward(call, residuals, dx):
    stacks, entering, layout, moving = residuals
    layout = jax.tree.unflatten(call.layout, layout)
    first = dict(reversed(call.layers))
    grads = {
        kind: {path: _span(stacks[kind][path], kind, call.layers) for path in paths}
        for kind, paths in moving.paths.items()
    }

    def branch(kind, mixer):
        def back(i, x, dx, grads):
            own = _layer(stacks[kind], i)
            part = {path: own[path] for path in grads[kind]}
            mix = lambda part, x: mixer({**own, **part}, x, layout)
            _, pull = jax.vjp(mix, part, x)
            dpart, through = pull(dx)
            write = lambda z, new: z.at[i - first[kind]].set(new)
            written = jax.tree.map(write, grads[kind], dpart)
            return dx + through, {**grads, kind: written}

        return back

    branches = [branch(*item) for item in call.mixers]

    def step(carry, layer):
        (kind, i), x = layer
        return lax.switch(kind, branches, i, x, *carry), None

    (dx, grads), _ = lax.scan(step, (dx, grads), (call.table, entering), reverse=True)
    whole = {
        kind: {
            path: _in_place(grads[kind][path], array, first[kind])
            if path in grads[kind]
            else None
            for path, array in stack.items()
        }
        for kind, stack in stacks.items()
    }
    return whole, dx, None


_run.defvjp(_forward, _backward, symbolic_zeros=True)


def _layer(stack: Params, i: Int[Array, ""]) -> Params:
    return {path: array[i] for path, array in stack.items()}


def _span(
    stack: Float[Array, "stack ..."], kind: str, layers: Layers
) -> Float[Array, "span ..."]:
    """Zeros for those layers of a stack that run."""
    return jnp.zeros_like(stack[: sum(kind == other for other, _ in layers)])


def _in_place(
    span: Float[Array, "span ..."], stack: Float[Array, "stack ..."], first: int
) -> Float[Array, "stack ..."]:
    """The gradient of a stack of whose layers only a span ran."""
    behind = len(stack) - first - len(span)
    return jnp.pad(span, [(first, behind)] + [(0, 0)] * (stack.ndim - 1))
