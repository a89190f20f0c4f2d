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
    q = einops.rearrange(q, "B T (K r) H -> B K r T H", K=k.shape[2])
    logits = jnp.einsum("BKrTH,BSKH->BKrTS", q, k, preferred_element_type=dtype)
    logits = jnp.where(mask, logits * scale, -jnp.inf)
    # Finite where nothing is seen, so that exp(-inf - peak) is 0 and not NaN.
    peak = logits.max(-1, keepdims=True, initial=jnp.finfo(dtype).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(peak))
    # A sum as a matmul: XLA on CPU runs it faster than its own.
    total = jnp.einsum("BKrTS,S->BKrT", weights, jnp.ones(k.shape[1], dtype))[..., None]
    out = jnp.einsum(
        "BKrTS,BSKH->BKrTH", weights.astype(v.dtype), v, preferred_element_type=dtype
    )
    out = out / jnp.where(total == 0, 1, total)
    return einops.rearrange(out, "B K r T H -> B T (K r) H").astype(q.dtype)
