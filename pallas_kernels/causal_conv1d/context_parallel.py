"""The causal convolution over a sequence cut into shards along a mesh axis.

Each shard needs the K - 1 inputs before it, which are the state that the shard before
leaves: one exchange with a neighbour. Call it under jax.shard_map.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.causal_conv1d.api import Implementation, causal_conv1d


def causal_conv1d_sharded(
    x: Float[Array, "B T C"],
    weight: Float[Array, "K C"],
    bias: Float[Array, "C"] | None = None,
    *,
    axis_name: str,
    initial_state: Float[Array, "B K-1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    activation: Literal["silu"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B K-1 C"]]:
    """`causal_conv1d` of this device's shard of T, equal to that of the whole sequence.

    Args:
      x, weight, bias, segment_ids, activation, implementation: As in `causal_conv1d`.
      axis_name: The mesh axis along which time is cut, in order.
      initial_state: The inputs before the first shard; the same everywhere.

    Returns:
      The shard's outputs, and the state after the last shard, the same everywhere.
    """
    halo = weight.shape[0] - 1
    if halo > x.shape[1]:
        raise ValueError(
            f"A shard of {x.shape[1]} tokens is shorter than the {halo} that the next"
            " one needs; use fewer shards."
        )
    # What the shard's end alone says: where its segment began before, all is zero.
    end = x.shape[1] - halo
    ids = None if segment_ids is None else segment_ids[:, end:]
    _, leaving = causal_conv1d(x[:, end:], weight, segment_ids=ids)
    here, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    to_the_next = [(i, i + 1) for i in range(devices - 1)]
    entering = lax.ppermute(leaving, axis_name, to_the_next)
    if segment_ids is not None:
        anew = _starts_anew(segment_ids, axis_name, to_the_next)
        entering = jnp.where(anew[:, None, None], 0, entering)
    if initial_state is not None:
        first = initial_state.astype(x.dtype)
        entering = jnp.where(here == 0, first, entering)
    y, _ = causal_conv1d(
        *(x, weight, bias),
        initial_state=entering,
        segment_ids=segment_ids,
        activation=activation,
        implementation=implementation,
    )
    last = jnp.where(here == devices - 1, leaving, 0)
    return y, lax.psum(last, axis_name)


def _starts_anew(
    segment_ids: Int[Array, "B T"], axis_name: str, to_the_next: list[tuple[int, int]]
) -> Bool[Array, "B"]:
    """Whether a segment starts at this shard's first token, as `segments` says."""
    first = segment_ids[:, 0]
    before = lax.ppermute(segment_ids[:, -1], axis_name, to_the_next)
    return (first != before) & (first != 0) & (lax.axis_index(axis_name) > 0)
