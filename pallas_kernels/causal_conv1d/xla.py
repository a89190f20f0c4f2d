"""The causal convolution as K shifted multiplies, which XLA fuses into one pass."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def causal_conv1d(
    padded: Float[Array, "B I C"],
    weight: Float[Array, "K C"],
    bias: Float[Array, "C"] | None,
    starts: Bool[Array, "B I"] | None,
) -> Float[Array, "B T C"]:
    """Sums the taps in float32, from the current token back to its segment's start.

    `padded` holds I = K - 1 + T inputs: those before the first token, then x.
    """
    K = weight.shape[0]
    T = padded.shape[1] - (K - 1)
    dtype = jnp.promote_types(padded.dtype, jnp.float32)
    y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
    reached = True
    for first in reversed(range(K)):
        tap = padded[:, first : first + T].astype(dtype) * weight[first].astype(dtype)
        if starts is not None:
            tap = jnp.where(reached, tap, 0)
            reached = reached & ~starts[:, first : first + T, None]
        y = y + tap
    return y
