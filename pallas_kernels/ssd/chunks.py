"""What the chunked forms of SSD share: their layout, and decay within a chunk.

A chunk has L tokens; `m` is the earlier and `l` the later of two. Heads of a group
share b and c, which are never repeated: `r` counts the heads of a group.
"""

from typing import NamedTuple

import einops
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class Chunks(NamedTuple):
    """A sequence cut into C chunks, for the scan to take one after another."""

    x: Float[Array, "*C B L G r P"]
    dt: Float[Array, "*C B G r L"]
    log_decay: Float[Array, "*C B G r L"]
    b: Float[Array, "*C B G L S"]
    c: Float[Array, "*C B G L S"]
    run: Int[Array, "*C B L"] | None


class Decay(NamedTuple):
    """What is left of a token when another one, or a chunk's edge, is reached."""

    between: Float[Array, "*C B G r L L"]  # Of m, at l; zero where l may not see m.
    from_start: Float[Array, "*C B G r L 1"]  # Of the state before the chunk, at l.
    to_end: Float[Array, "*C B G r L 1"]  # Of m, in the state after the chunk.
    across: Float[Array, "*C B G r 1 1"]  # Of the state before, in the state after.


def cut(
    x: Float[Array, "B T N P"],
    dt: Float[Array, "B T N"],
    a: Float[Array, "N"],
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    starts: Bool[Array, "B T"] | None,
    chunk_size: int,
) -> Chunks:
    """Pads T to whole chunks with dt = 0, which changes nothing, and cuts."""
    T, G = x.shape[1], b.shape[2]
    L = min(chunk_size, T)

    def to_chunks(z: Shaped[Array, "B T *rest"], pattern: str):
        z = jnp.pad(z, [(0, 0), (0, -T % L)] + [(0, 0)] * (z.ndim - 2))
        sizes = {"G": G} if "G r" in pattern else {}
        return einops.rearrange(z, pattern, L=L, **sizes)

    run = None
    if starts is not None:
        run = jnp.cumsum(to_chunks(starts, "B (C L) -> C B L"), axis=-1)
    return Chunks(
        x=to_chunks(x, "B (C L) (G r) P -> C B L G r P"),
        dt=to_chunks(dt, "B (C L) (G r) -> C B G r L"),
        log_decay=to_chunks(a * dt, "B (C L) (G r) -> C B G r L"),
        b=to_chunks(b, "B (C L) G S -> C B G L S"),
        c=to_chunks(c, "B (C L) G S -> C B G L S"),
        run=run,
    )


def join(y: Float[Array, "C B L G r P"], T: int) -> Float[Array, "B T N P"]:
    """Puts the chunks of an output together again, without the padding."""
    return einops.rearrange(y, "C B L G r P -> B (C L) (G r) P")[:, :T]


def split_heads(state: Float[Array, "B N P S"], G: int) -> Float[Array, "B G r P S"]:
    """The heads by group."""
    return einops.rearrange(state, "B (G r) P S -> B G r P S", G=G)


def merge_heads(state: Float[Array, "B G r P S"]) -> Float[Array, "B N P S"]:
    """Undoes `split_heads`."""
    return einops.rearrange(state, "B G r P S -> B (G r) P S")


def decay(
    log_decay: Float[Array, "*C B G r L"], run: Int[Array, "*C B L"] | None
) -> Decay:
    """Decay of every kind, from each token's own log decay.

    Decays are exponentials of differences of a running sum, and an exponent above zero
    is masked before it is taken: no factor overflows, however strong the decay.
    """
    L = log_decay.shape[-1]
    seen = jnp.tril(jnp.ones((L, L), bool))
    # As a matmul the sum is a buffer of its own: XLA on CPU would fuse a cumsum's
    # operands into every one of the L * L exponentials below.
    total = jnp.einsum(
        "...m,lm->...l", log_decay, seen.astype(log_decay.dtype), precision="highest"
    )
    if run is None:
        fresh = kept = whole = True
    else:
        run = run[..., None, None, :]
        seen = seen & (run[..., :, None] == run[..., None, :])
        fresh = run == 0  # Still in the segment that entered the chunk.
        kept = run == run[..., -1:]  # Already in the segment that leaves it.
        whole = fresh[..., -1:]

    def masked_exp(mask, exponent):
        return jnp.exp(jnp.where(mask, exponent, -jnp.inf))

    return Decay(
        between=masked_exp(seen, total[..., :, None] - total[..., None, :]),
        from_start=masked_exp(fresh, total)[..., None],
        to_end=masked_exp(kept, total[..., -1:] - total)[..., None],
        across=masked_exp(whole, total[..., -1:])[..., None],
    )
