"""Attention over a cache: an online softmax, one block of keys at a time.

The loop ends behind the last key that exists, so the cost follows what is in the cache
and not its capacity, with one compiled program for every length. For inference: a loop
whose length is not known has no reverse-mode derivative.
"""

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.mask import visible


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
    block_size: int = 512,
) -> Float[Array, "B T N H"]:
    """See `api.attention`; `r` counts the query heads that share a key head."""
    T, (S, K) = q.shape[1], k.shape[1:3]
    block_size = min(block_size, S)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q_rows = einops.rearrange(q, "B T (K r) H -> B K r T H", K=K)

    def one_block(i, carry):
        out, peak, total = carry
        # The last block ends with the cache. What it shares with the one before was
        # read then, and is masked now.
        start = jnp.minimum(i * block_size, S - block_size)

        def block(z):
            return jax.lax.dynamic_slice_in_dim(z, start, block_size, axis=1)

        positions = start + jnp.arange(block_size)
        mask = (positions >= i * block_size) & visible(
            q_offset + jnp.arange(T),
            positions,
            causal=causal,
            q_segment_ids=q_segment_ids,
            kv_segment_ids=None if kv_segment_ids is None else block(kv_segment_ids),
            kv_mask=None if kv_mask is None else block(kv_mask),
            kv_length=kv_length,
        )
        logits = jnp.einsum(
            "BKrTH,BSKH->BKrTS", q_rows, block(k), preferred_element_type=dtype
        )
        logits = jnp.where(mask, logits * scale, -jnp.inf)
        new_peak = jnp.maximum(peak, logits.max(-1, keepdims=True))
        weights = jnp.exp(logits - new_peak)
        read = jnp.einsum(
            "BKrTS,BSKH->BKrTH",
            weights.astype(v.dtype),
            block(v),
            preferred_element_type=dtype,
        )
        keep = jnp.exp(peak - new_peak)
        total = keep * total + weights.sum(-1, keepdims=True)
        return keep * out + read, new_peak, total

    end = jnp.minimum(kv_length, S)
    if causal:
        end = jnp.minimum(end, q_offset + T)
    out = jnp.zeros(q_rows.shape, dtype)
    total = jnp.zeros_like(out[..., :1])
    # Finite where nothing is seen, so that exp(-inf - peak) is 0 and not NaN.
    peak = jnp.full_like(total, jnp.finfo(dtype).min)
    out, _, total = jax.lax.fori_loop(
        0, -(-end // block_size), one_block, (out, peak, total)
    )
    out = out / jnp.where(total == 0, 1, total)
    return einops.rearrange(out, "B K r T H -> B T (K r) H").astype(q.dtype)
