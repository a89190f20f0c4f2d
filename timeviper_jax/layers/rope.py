"""Rotary positions: queries and keys turn by where they stand.

https://arxiv.org/abs/2104.09864, in the layout of published Llama and Qwen2 weights:
channel i and channel i + H / 2 are one pair.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float
) -> Float[Array, "B T N H"]:
    """Pair i of each head, turned by position / theta^(2i / H); in float32."""
    H = x.shape[-1]
    rates = 1 / np.float32(theta) ** (np.arange(0, H, 2, dtype=np.float32) / H)
    angles = positions[..., None, None].astype(jnp.float32) * rates  # B T 1 H/2
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
