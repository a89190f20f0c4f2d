"""Which keys a query sees: one rule for every implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def visible(
    q_positions: Int[Array, "T"],
    kv_positions: Int[Array, "S"],
    *,
    causal: bool,
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    kv_mask: Bool[Array, "B S"] | None,
    kv_length: Int[Array, ""] | int,
) -> Bool[Array, "#B 1 1 T S"]:
    """True where query T may see key S, the same for all heads."""
    mask = jnp.broadcast_to(
        kv_positions < kv_length, (1, q_positions.size, kv_positions.size)
    )
    if causal:
        mask &= kv_positions <= q_positions[:, None]
    if q_segment_ids is not None:
        mask = mask & (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])
    if kv_mask is not None:
        mask = mask & kv_mask[:, None]
    return mask[:, None, None]
