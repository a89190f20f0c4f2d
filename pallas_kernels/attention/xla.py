"""Dense attention in plain XLA: every logit at once. Differentiable."""

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
) -> Float[Array, "B T N H"]:
    """See `api.attention`; `r` counts the query heads that share a key head."""
    mask = visible(
        q_offset + jnp.arange(q.shape[1]),
        jnp.arange(k.shape[1]),
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        kv_mask=kv_mask,
        kv_length=kv_length,
    )
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = einops.rearrange(q, "B T (K r) H -> B T K r H", K=k.shape[2])
    logits = jnp.einsum("BTKrH,BSKH->BKrTS", q, k, preferred_element_type=dtype)
    # Finite, so that a query that sees nothing has a softmax, and a gradient, to mask.
    logits = jnp.where(mask, scale * logits, jnp.finfo(dtype).min)
    weights = jnp.where(mask, jax.nn.softmax(logits), 0).astype(v.dtype)
    out = jnp.einsum("BKrTS,BSKH->BTKrH", weights, v, preferred_element_type=dtype)
    return einops.rearrange(out, "B T K r H -> B T (K r) H").astype(q.dtype)
