"""Attention over blocks of keys with a running softmax: for long caches.

The number of blocks follows `kv_length`, so that the cost follows what a cache holds
and not its capacity; memory is one block's logits. Not differentiable in reverse.
"""

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.mask import visible

_BLOCK = 512  # Keys at a time.


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    kv_mask: Bool[Array, "B S"] | None,
    q_offset: Int[Array, ""] | int,
    kv_length: Int[Array, ""] | int,
    scale: float,
) -> Float[Array, "B T N H"]:
    """See `api.attention`; `r` counts the query heads that share a key head."""
    B, T, _, H = q.shape
    S, K = k.shape[1:3]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = einops.rearrange(q, "B T (K r) H -> B K r T H", K=K)
    size = min(_BLOCK, S)
    lowest = jnp.finfo(dtype).min

    def one_block(i, carry):
        largest, total, sums = carry
        # The last block of a ragged S begins early; its first keys were seen.
        start = jnp.minimum(i * size, S - size)
        cut = lambda z: (
            z if z is None else jax.lax.dynamic_slice_in_dim(z, start, size, 1)
        )
        positions = start + jnp.arange(size)
        mask = visible(
            q_offset + jnp.arange(T),
            positions,
            causal=causal,
            q_segment_ids=q_segment_ids,
            kv_segment_ids=cut(kv_segment_ids),
            kv_mask=cut(kv_mask),
            kv_length=kv_length,
        )
        mask &= positions >= i * size
        logits = scale * jnp.einsum(
            "BKrTH,BSKH->BKrTS", q, cut(k), preferred_element_type=dtype
        )
        logits = jnp.where(mask, logits, lowest)
        new = jnp.maximum(largest, jnp.max(logits, axis=-1))
        weights = jnp.where(mask, jnp.exp(logits - new[..., None]), 0)
        decay = jnp.exp(largest - new)
        total = decay * total + jnp.sum(weights, axis=-1)
        read = jnp.einsum(
            "BKrTS,BSKH->BKrTH",
            weights.astype(v.dtype),
            cut(v),
            preferred_element_type=dtype,
        )
        return new, total, decay[..., None] * sums + read

    shape = q.shape[:-1]
    start = (
        jnp.full(shape, lowest, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros(q.shape, dtype),
    )
    blocks = (jnp.minimum(kv_length, S) + size - 1) // size
    _, total, sums = jax.lax.fori_loop(0, blocks, one_block, start)
    out = sums / jnp.where(total > 0, total, 1)[..., None]
    return einops.rearrange(out, "B K r T H -> B T (K r) H").astype(v.dtype)
