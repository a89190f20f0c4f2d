"""The programs that are compiled: one op, in one direction, as a model calls it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.platform import target_device_kind
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.tpu import plan


class Shape(NamedTuple):
    """Sizes of an SSD."""

    tokens: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    dtype: str = "bfloat16"


NANO_9B = Shape(32768, 128, 80, 8, 128)


class Program(NamedTuple):
    """A function of arrays, their shapes, and how often each kernel's code runs.

    `counted` are the kernels of this direction; none where XLA does all. `flops` are
    those of matmuls, where they and not the memory may bound the op.
    """

    run: Callable
    inputs: dict[str, jax.ShapeDtypeStruct]
    executions: dict[str, int]
    counted: tuple[str, ...]
    flops: float = 0


def forward(shape: Shape) -> Program:
    """SSD with segments, a first and a last state, and d.

    Channels come and go as one axis, as projections make them: apart, x would be padded
    to whole registers a head in memory.
    """

    def run(x, dt, a, b, c, d, state, segment_ids):
        by_head = (*x.shape[:2], shape.heads, shape.head_dim)
        by_group = (*x.shape[:2], shape.groups, shape.state_dim)
        y, last = ssd(
            x.reshape(by_head),
            dt,
            a,
            b.reshape(by_group),
            c.reshape(by_group),
            d=d,
            initial_state=state,
            segment_ids=segment_ids,
            implementation="pallas_tpu",
        )
        return y.reshape(x.shape), last

    T, N, P, G, S, dtype = shape
    of = lambda *sizes, kind=dtype: jax.ShapeDtypeStruct(sizes, kind)
    f32 = jnp.float32
    inputs = {
        "x": of(1, T, N * P),
        "dt": of(1, T, N, kind=f32),
        "a": of(N, kind=f32),
        "b": of(1, T, G * S),
        "c": of(1, T, G * S),
        "d": of(N, kind=f32),
        "state": of(1, N, P, S, kind=f32),
        "segment_ids": of(1, T, kind=jnp.int32),
    }
    sizes = plan.of_forward(_plan(shape), target_device_kind())
    sets = sizes.groups * sizes.parts
    executions = {"ssd_forward": sets * (sizes.blocks + 2)}
    return Program(run, inputs, executions, ("ssd_forward",))


def backward(shape: Shape) -> Program:
    """The same with the gradient of every argument, from outputs and last state."""
    run, inputs, executions, *_ = forward(shape)

    def with_gradients(segment_ids, dy, dlast, **arrays):
        outputs, pull = jax.vjp(lambda z: run(**z, segment_ids=segment_ids), arrays)
        return outputs, pull((dy, dlast))

    sizes = plan.of_backward(_plan(shape))
    spans = -(-sizes.blocks // sizes.blocks_per_span)
    blocks = spans * sizes.blocks_per_span
    inputs = inputs | {"dy": inputs["x"], "dlast": inputs["state"]}
    executions = executions | {"ssd_backward": sizes.groups * sizes.parts * blocks}
    return Program(with_gradients, inputs, executions, ("ssd_backward",))


DIRECTIONS = {"forward": forward, "backward": backward}


def _plan(shape: Shape) -> plan.Plan:
    T, N, P, G, S, dtype = shape
    x = jax.ShapeDtypeStruct((1, T, N, P), dtype)
    return plan.make(x, jax.ShapeDtypeStruct((1, T, G, S), dtype), "tpu")
