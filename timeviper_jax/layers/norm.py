"""RMS normalisation, over the width or over groups of it. Statistics in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def rms_normalise(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """Divides by the root mean square of the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """RMS norm with a learned scale that starts at one."""

    def __init__(self, dim: int, *, eps: float, param_dtype: str, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(
            nnx.initializers.ones(rngs.params(), (dim,), param_dtype)
        )

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return (rms_normalise(x, self.eps) * self.scale[...]).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """Mamba-2's output norm: RMS over each group of channels of `x * silu(gate)`.

    The gate comes before the norm, and each group of `dim / groups` channels has a
    root mean square of its own.
    """

    def __init__(
        self, dim: int, groups: int, *, eps: float, param_dtype: str, rngs: nnx.Rngs
    ):
        self.group_dim, self.eps = dim // groups, eps
        self.scale = nnx.Param(
            nnx.initializers.ones(rngs.params(), (dim,), param_dtype)
        )

    def __call__(
        self, x: Float[Array, "*B D"], gate: Float[Array, "*B D"]
    ) -> Float[Array, "*B D"]:
        gated = x.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        grouped = gated.reshape(*x.shape[:-1], -1, self.group_dim)
        normed = rms_normalise(grouped, self.eps).reshape(x.shape)
        return (normed * self.scale[...]).astype(x.dtype)
