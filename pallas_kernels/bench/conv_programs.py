"""The causal convolution that is compiled: SiLU, over a row of packed samples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench.programs import Program
from pallas_kernels.causal_conv1d import causal_conv1d


class Shape(NamedTuple):
    """Sizes of a convolution."""

    tokens: int
    channels: int
    taps: int
    dtype: str = "bfloat16"


NANO_9B = Shape(32768, 128 * 80 + 2 * 8 * 128, 4)


def forward(shape: Shape) -> Program:
    """Convolution with bias, SiLU, segments, a first and a last state."""

    def run(x, weight, bias, state, segment_ids):
        return causal_conv1d(
            *(x, weight, bias),
            initial_state=state,
            segment_ids=segment_ids,
            activation="silu",
        )

    T, C, K, dtype = shape
    inputs = {
        "x": jax.ShapeDtypeStruct((1, T, C), dtype),
        "weight": jax.ShapeDtypeStruct((K, C), dtype),
        "bias": jax.ShapeDtypeStruct((C,), dtype),
        "state": jax.ShapeDtypeStruct((1, K - 1, C), dtype),
        "segment_ids": jax.ShapeDtypeStruct((1, T), jnp.int32),
    }
    return Program(run, inputs, {}, ())


def backward(shape: Shape) -> Program:
    """The same with the gradient of every argument."""
    run, inputs, *_ = forward(shape)

    def with_gradients(segment_ids, dy, dstate, **arrays):
        out, pull = jax.vjp(lambda z: run(**z, segment_ids=segment_ids), arrays)
        return out, pull((dy, dstate))

    inputs = inputs | {"dy": inputs["x"], "dstate": inputs["state"]}
    return Program(with_gradients, inputs, {}, ())


DIRECTIONS = {"forward": forward, "backward": backward}
