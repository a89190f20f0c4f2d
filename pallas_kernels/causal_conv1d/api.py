"""Public entry point of the causal convolution: checks arguments, picks who runs it."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.causal_conv1d import xla
from pallas_kernels.platform import target_platform
from pallas_kernels.segments import segment_starts

Implementation = Literal["xla"]

_PREFERRED: dict[str, Implementation] = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}


def causal_conv1d(
    x: Float[Array, "B T C"],
    weight: Float[Array, "K C"],
    bias: Float[Array, "C"] | None = None,
    *,
    initial_state: Float[Array, "B K-1 C"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: Literal["silu"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B K-1 C"]]:
    """Convolves each channel with its own K taps over the present and the past.

      y_t = activation(bias + sum_k weight[k] x_{t - (K - 1) + k})

    `weight[K - 1]` multiplies the current token. The inputs before the first token are
    `initial_state`; no tap reaches across the start of a segment.

    Args:
      x: Inputs.
      weight: Taps, the oldest first.
      bias: Added to every output; none by default.
      initial_state: The K - 1 inputs before x, of the first token's segment; zeros by
        default.
      lengths: Valid tokens in each row of x, for the state; all by default. What y says
        behind them means nothing.
      segment_ids: Packed sequences; see `segments.segment_starts`.
      activation: "silu" or none.
      implementation: Which one to run. By default the fastest on this platform; a
        named one is run or raises, never replaced.

    Returns:
      The outputs, and the last K - 1 valid inputs of the segment in progress: the
      `initial_state` of a call that carries on. Both in x's dtype.
    """
    (B, T, C), K = x.shape, weight.shape[0]
    for what, array, shape in (
        ("weight", weight, (K, C)),
        ("bias", bias, (C,)),
        ("initial_state", initial_state, (B, K - 1, C)),
        ("lengths", lengths, (B,)),
        ("segment_ids", segment_ids, (B, T)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{what} {array.shape} must be {shape} for x {x.shape} and {K} taps."
            )
    if activation not in (None, "silu"):
        raise ValueError(f'{activation=} must be "silu" or None.')
    name = implementation or _PREFERRED[target_platform()]
    run = {"xla": xla.causal_conv1d}
    if name not in run:
        raise ValueError(f"{implementation=} is not one of {get_args(Implementation)}.")

    if initial_state is None:
        initial_state = jnp.zeros((B, K - 1, C), x.dtype)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    y = run[name](x, weight, bias, initial_state, starts, activation)
    return y, _last_inputs(x, initial_state.astype(x.dtype), starts, lengths)


def _last_inputs(
    x: Float[Array, "B T C"],
    initial_state: Float[Array, "B W C"],
    starts: Bool[Array, "B T"] | None,
    lengths: Int[Array, "B"] | None,
) -> Float[Array, "B W C"]:
    """The W inputs before each row's end, zero where they are another segment's."""
    (B, T, _), W = x.shape, initial_state.shape[1]
    if lengths is None:
        lengths = jnp.full((B,), T)
        state = jnp.concatenate([initial_state, x[:, max(T - W, 0) :]], axis=1)
        state = state[:, state.shape[1] - W :]
    else:
        state = _before_end(x, initial_state, lengths)
    if starts is None:
        return state
    index = lengths[:, None] + jnp.arange(W) - W  # B W
    begun = jnp.take_along_axis(starts, jnp.maximum(index, 0), axis=1) & (index >= 0)
    begun_after = jax.lax.cumsum(begun.astype(int), axis=1, reverse=True) - begun
    return jnp.where(begun_after[..., None] == 0, state, 0)


def _before_end(
    x: Float[Array, "B T C"],
    initial_state: Float[Array, "B W C"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B W C"]:
    """The W inputs before each row's end, gathered with no copy of x."""
    W = initial_state.shape[1]
    index = (lengths[:, None] + jnp.arange(W))[..., None]  # B W 1, from the state's.
    late = jnp.take_along_axis(x, jnp.maximum(index - W, 0), axis=1)
    early = jnp.take_along_axis(initial_state, jnp.minimum(index, W - 1), axis=1)
    return jnp.where(index < W, early, late)
