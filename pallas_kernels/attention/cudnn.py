"""Attention on NVIDIA GPUs: cuDNN's flash attention, as JAX offers it.

Causality is cuDNN's own. Any other rule becomes an array of B T S, which every head
shares: refused where it would be large.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.mask import visible
from pallas_kernels.platform import target_platform

_LARGEST_MASK = 2**28  # Elements, of two bytes each in cuDNN's hands.
_WIDEST_HEAD = 128


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
    """See `api.attention`; in bfloat16 or float16."""
    T, S = q.shape[1], k.shape[1]
    static = isinstance(q_offset, int) and isinstance(kv_length, int)
    from_start = static and (not causal or q_offset == 0)
    packed = q_segment_ids is not None or kv_mask is not None
    masked = packed or not from_start or kv_length < S or (causal and T > S)
    _check(q, k, v, masked)
    options = {"scale": scale, "is_causal": causal and not masked}
    if not masked:
        return _run(q, k, v, **options)
    mask = visible(
        q_offset + jnp.arange(T),
        jnp.arange(S),
        causal=causal,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        kv_mask=kv_mask,
        kv_length=kv_length,
    )[:, 0]
    out = _run(q, k, v, mask=mask, **options)
    sees = jnp.swapaxes(mask.any(-1, keepdims=True), 1, 2)  # B T 1 1
    return jnp.where(sees, out, 0)


def _run(q, k, v, **options) -> Float[Array, "B T N H"]:
    try:
        return jax.nn.dot_product_attention(q, k, v, **options, implementation="cudnn")
    except RuntimeError as missing:
        raise NotImplementedError(f'"cudnn" cannot be compiled: {missing}') from None


def _check(q, k, v, masked: bool) -> None:
    """Raises NotImplementedError where cuDNN doesn't take the arrays; says why."""
    (B, T, _, H), S = q.shape, k.shape[1]
    if target_platform() != "gpu":
        raise NotImplementedError(
            f'"cudnn" runs on NVIDIA GPUs, not on {target_platform()!r}.'
        )
    dtypes = {z.dtype.name for z in (q, k, v)}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        raise NotImplementedError(
            f"q, k and v must all be bfloat16 or all float16, not {sorted(dtypes)}."
        )
    if H % 8 or H > _WIDEST_HEAD:
        raise NotImplementedError(
            f"Heads must be a multiple of 8 wide, up to {_WIDEST_HEAD}, not {H}."
        )
    if not q.size or not k.size:
        raise NotImplementedError(f"There is nothing to read: q {q.shape} k {k.shape}.")
    if masked and (T % 2 or S % 2):
        raise NotImplementedError(f"A mask of odd lengths, {T} x {S}, is not taken.")
    if masked and B * T * S > _LARGEST_MASK:
        raise NotImplementedError(
            f"A mask of {B} x {T} x {S} is over {_LARGEST_MASK} elements."
        )
