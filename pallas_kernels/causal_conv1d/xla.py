"""The causal convolution as K shifted multiplies, which XLA fuses into one pass."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv1d(
    padded: Float[Array, "B I C"],
    weight: Float[Array, "K C"],
    bias: Float[Array, "C"] | None,
    runs: Int[Array, "B I"] | None,
) -> Float[Array, "B T C"]:
    """Sums the taps in float32; a tap counts only within its token's run.

    `padded` holds I = K - 1 + T inputs: those before the first token, then x.
    """
    K = weight.shape[0]
    T = padded.shape[1] - (K - 1)
    dtype = jnp.promote_types(padded.dtype, jnp.float32)
    y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
    for k in range(K):
        tap = padded[:, k : k + T].astype(dtype) * weight[k].astype(dtype)
        if runs is not None:
            same = runs[:, k : k + T] == runs[:, K - 1 :]
            tap = jnp.where(same[..., None], tap, 0)
        y = y + tap
    return y
