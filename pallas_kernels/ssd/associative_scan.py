"""SSD in plain XLA with no loop: all chunks at once, their states combined as a tree.

The depth is the logarithm of the number of chunks, and every chunk's L x L weights are
alive together: for short sequences, and for hardware that a sequential scan starves.
"""

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.ssd import chunks


def ssd(
    x: Float[Array, "B T N P"],
    dt: Float[Array, "B T N"],
    a: Float[Array, "N"],
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    initial_state: Float[Array, "B N P S"],
    starts: Bool[Array, "B T"] | None,
    *,
    chunk_size: int,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P S"]]:
    """See `api.ssd`; differentiated by JAX, unlike `scan`."""
    x_chunks, dt, log_decay, b, c, run = chunks.cut(x, dt, a, b, c, starts, chunk_size)
    xdt = einops.rearrange(x_chunks, "C B L G r P -> C B G r L P") * dt[..., None]
    decay = chunks.decay(log_decay, run)
    own = jnp.einsum("CBGmS,CBGrmP->CBGrPS", b, xdt * decay.to_end)
    states = _states(chunks.split_heads(initial_state, b.shape[2]), decay.across, own)

    scores = jnp.einsum("CBGlS,CBGmS->CBGlm", c, b)[:, :, :, None]
    y = jnp.einsum("CBGrlm,CBGrmP->CBGrlP", scores * decay.between, xdt)
    y += jnp.einsum("CBGlS,CBGrPS->CBGrlP", c, states[:-1]) * decay.from_start
    y = einops.rearrange(y, "C B G r L P -> C B L G r P")
    return chunks.join(y, T=x.shape[1]), chunks.merge_heads(states[-1])


def _states(
    initial: Float[Array, "B G r P S"],
    across: Float[Array, "C B G r 1 1"],
    own: Float[Array, "C B G r P S"],
) -> Float[Array, "C+1 B G r P S"]:
    """The state before every chunk, and after the last."""

    def then(first, second):
        (across1, own1), (across2, own2) = first, second
        return across1 * across2, across2 * own1 + own2

    across = jnp.concatenate([jnp.ones_like(across[:1]), across])
    own = jnp.concatenate([initial[None], own])
    return jax.lax.associative_scan(then, (across, own))[1]
