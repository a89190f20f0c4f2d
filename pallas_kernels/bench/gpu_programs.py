"""The SSD as it is compiled and timed for GPUs: its inputs, and both directions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.bench.programs import Shape
from pallas_kernels.ssd import ssd


def inputs(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """Segments, a first state and d included; cotangents of both outputs too."""
    T, N, P, G, S, dtype = shape
    of = lambda *sizes, kind="float32": jax.ShapeDtypeStruct(sizes, kind)
    return {
        "x": of(1, T, N, P, kind=dtype),
        "dt": of(1, T, N),
        "a": of(N),
        "b": of(1, T, G, S, kind=dtype),
        "c": of(1, T, G, S, kind=dtype),
        "d": of(N),
        "state": of(1, N, P, S),
        "segment_ids": of(1, T, kind="int32"),
        "dy": of(1, T, N, P, kind=dtype),
        "dlast": of(1, N, P, S),
    }


def drawn(shape: Shape) -> dict[str, jax.Array]:
    """Such inputs at random, of four segments; steps are about 0.05."""
    keys = iter(jax.random.split(jax.random.key(0), 10))
    draw = lambda z: jax.random.normal(next(keys), z.shape, z.dtype)
    structs = inputs(shape)
    ids = structs.pop("segment_ids")
    arrays = {name: draw(z) for name, z in structs.items()}
    arrays["dt"] = jax.nn.softplus(arrays["dt"] - 3)
    arrays["a"] = -jnp.exp(arrays["a"])
    ids = jnp.broadcast_to(1 + jnp.arange(shape.tokens) * 4 // shape.tokens, ids.shape)
    return arrays | {"segment_ids": ids.astype(jnp.int32)}


def forward(implementation: str, **options) -> Callable:
    """Outputs and last state."""

    def run(x, dt, a, b, c, d, state, segment_ids, dy=None, dlast=None):
        return ssd(
            *(x, dt, a, b, c),
            d=d,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=implementation,
            **options,
        )

    return run


def forward_backward(implementation: str, **options) -> Callable:
    """The same with the gradient of every argument, from outputs and last state."""
    run = forward(implementation, **options)

    def with_gradients(segment_ids, dy, dlast, **arrays):
        outputs, pull = jax.vjp(lambda z: run(**z, segment_ids=segment_ids), arrays)
        return outputs, pull((dy, dlast))

    return with_gradients


DIRECTIONS = {"forward": forward, "backward": forward_backward}
