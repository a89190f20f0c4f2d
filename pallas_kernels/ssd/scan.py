"""SSD in plain XLA: matmuls inside a chunk, a scan between chunks.

Runs anywhere and differentiates with no custom rule. Algorithm 1 of
https://arxiv.org/abs/2405.21060; the comments name its four steps. Heads of one group
share b and c, which are never repeated: `r` counts the heads of a group.
"""

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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
    """See `api.ssd`; T is padded to whole chunks with dt = 0, which changes nothing."""
    T, G = x.shape[1], b.shape[2]
    pad = -T % chunk_size
    a = einops.rearrange(a, "(G r) -> G r 1", G=G)
    causal = jnp.tril(jnp.ones((chunk_size, chunk_size), bool))

    def to_chunks(z, pattern, **sizes):
        z = jnp.pad(z, [(0, 0), (0, pad)] + [(0, 0)] * (z.ndim - 2))
        return einops.rearrange(z, pattern, L=chunk_size, **sizes)

    def one_chunk(state, inputs):
        x, dt, b, c, *start = inputs
        log_decay = jnp.cumsum(a * dt, axis=-1)  # B G r L, from the chunk's start.
        seen, fresh, kept = causal, jnp.exp(log_decay), log_decay[..., -1:] - log_decay
        kept = jnp.exp(kept)
        through = jnp.exp(log_decay[..., -1])
        if start:
            run = jnp.cumsum(start[0], axis=-1)[:, None, None]  # B 1 1 L
            seen = seen & (run[..., :, None] == run[..., None, :])
            fresh = jnp.where(run == 0, fresh, 0)
            kept = jnp.where(run == run[..., -1:], kept, 0)
            through = jnp.where(run[..., -1] == 0, through, 0)
        xdt = x * dt[..., None]
        # 1. Within the chunk: attention whose mask is the decay between positions.
        span = jnp.minimum(log_decay[..., :, None] - log_decay[..., None, :], 0)
        weight = jnp.where(seen, jnp.exp(span), 0)  # B G r L M
        scores = jnp.einsum("BGLS,BGMS->BGLM", c, b)
        y = jnp.einsum("BGrLM,BGrMP->BGrLP", scores[:, :, None] * weight, xdt)
        # 2. What earlier chunks left behind, read through this chunk's decay.
        y += jnp.einsum("BGLS,BGrPS->BGrLP", c, state) * fresh[..., None]
        # 3. and 4. This chunk's own state, added to the decayed one it was given.
        state = state * through[..., None, None]
        state += jnp.einsum("BGLS,BGrLP->BGrPS", b, xdt * kept[..., None])
        return state, y

    chunks = [
        to_chunks(x, "B (C L) (G r) P -> C B G r L P", G=G),
        to_chunks(dt, "B (C L) (G r) -> C B G r L", G=G),
        to_chunks(b, "B (C L) G S -> C B G L S"),
        to_chunks(c, "B (C L) G S -> C B G L S"),
    ]
    if starts is not None:
        chunks.append(to_chunks(starts, "B (C L) -> C B L"))
    state = einops.rearrange(initial_state, "B (G r) P S -> B G r P S", G=G)
    state, y = jax.lax.scan(jax.checkpoint(one_chunk), state, tuple(chunks))
    y = einops.rearrange(y, "C B G r L P -> B (C L) (G r) P")[:, :T]
    return y, einops.rearrange(state, "B G r P S -> B (G r) P S")
