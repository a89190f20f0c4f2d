"""The SSD over a sequence that is cut into contiguous shards along a mesh axis.

Every shard runs from a state of zeros; then shards exchange what they did to the state,
its own part and the decay of what enters, once; and each adds to its outputs what the
state that really enters contributes. Call it under jax.shard_map.
"""

import einops
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.segments import segment_starts
from pallas_kernels.ssd.api import Implementation, ssd


def ssd_sharded(
    x: Float[Array, "B T N P"],
    dt: Float[Array, "B T N"],
    a: Float[Array, "N"],
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    *,
    axis_name: str,
    d: Float[Array, "N"] | None = None,
    initial_state: Float[Array, "B N P S"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int = 64,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P S"]]:
    """`ssd` of this device's shard of T, equal to that of the whole sequence.

    Args:
      x, dt, a, b, c, d, segment_ids, chunk_size, implementation: As in `ssd`.
      axis_name: The mesh axis along which time is cut, in order.
      initial_state: Before the first token of the first shard; the same everywhere.

    Returns:
      The shard's outputs, and the state after the last token of the last shard, the
      same everywhere.
    """
    y, own = ssd(
        *(x, dt, a, b, c),
        d=d,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    log_decay = jnp.cumsum(a * dt.astype(own.dtype), axis=1)
    fresh = _not_started(segment_ids, axis_name)
    from_start = jnp.exp(log_decay)
    if fresh is not None:
        from_start = jnp.where(fresh[..., None], from_start, 0)
    first = jnp.zeros_like(own) if initial_state is None else initial_state
    entering, last = _states(first, own, from_start[:, -1], axis_name)
    by_group = einops.rearrange(entering, "B (G r) P S -> B G r P S", G=b.shape[2])
    read = jnp.einsum("BTGS,BGrPS->BTGrP", c.astype(own.dtype), by_group)
    read = einops.rearrange(read, "B T G r P -> B T (G r) P") * from_start[..., None]
    return (y.astype(own.dtype) + read).astype(x.dtype), last


def _not_started(
    segment_ids: Int[Array, "B T"] | None, axis_name: str
) -> Bool[Array, "B T"] | None:
    """True up to the first token that starts a segment: what enters is still seen."""
    if segment_ids is None:
        return None
    devices = lax.axis_size(axis_name)
    to_the_next = [(i, i + 1) for i in range(devices - 1)]
    before = lax.ppermute(segment_ids[:, -1:], axis_name, to_the_next)
    # Nothing stands before the first shard, whose first token starts no segment.
    before = jnp.where(lax.axis_index(axis_name) == 0, segment_ids[:, :1], before)
    starts = segment_starts(jnp.concatenate([before, segment_ids], axis=1))[:, 1:]
    return jnp.cumsum(starts, axis=1) == 0


def _states(
    first: Float[Array, "B N P S"],
    own: Float[Array, "B N P S"],
    across: Float[Array, "B N"],
    axis_name: str,
) -> tuple[Float[Array, "B N P S"], Float[Array, "B N P S"]]:
    """The state that enters this shard, and the one after the last shard."""
    owns, acrosses = lax.all_gather((own, across), axis_name)
    here, state, entering = lax.axis_index(axis_name), first, jnp.zeros_like(own)
    for shard in range(lax.axis_size(axis_name)):
        entering = jnp.where(here == shard, state, entering)
        state = state * acrosses[shard][..., None, None] + owns[shard]
    return entering, state
