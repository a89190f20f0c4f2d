"""One number a token and head: steps, decays, and where segments begin. XLA makes them.

They are a hundredth of the bytes, and every kernel needs some.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.ssd.gpu.plan import Plan


class Rows(NamedTuple):
    """Time last, padded to whole chunks with dt = 0, which changes nothing."""

    dt: Float[Array, "B N C L"]
    log_decay: Float[Array, "B N C L"]  # Since the chunk's start, in units of log 2.
    run: Int[Array, "B C L"]  # Counts the segments that have begun in the chunk.
    from_start: Float[Array, "B N C L"]  # What is left of the state before, at a token.
    to_end: Float[Array, "B N C L"]  # What is left of a token, behind the chunk.
    across: Float[Array, "B N C"]  # What is left of the state before, behind it.


def make(
    dt: Float[Array, "B T N"],
    a: Float[Array, "N"],
    starts: Bool[Array, "B T"] | None,
    plan: Plan,
) -> Rows:
    """Cuts dt into chunks and sums its decay up within them."""
    dt = cut(jnp.swapaxes(dt, 1, 2), plan)
    rates = (a * math.log2(math.e))[:, None, None]
    log_decay = jnp.cumsum(rates * dt, axis=-1)
    if starts is None:
        starts = jnp.zeros((plan.batch, plan.tokens), bool)
    run = jnp.cumsum(cut(starts, plan), axis=-1, dtype=jnp.int32)
    fresh = (run == 0)[:, None]  # Still in the segment that entered the chunk.
    kept = (run == run[..., -1:])[:, None]  # Already in the one that leaves it.
    from_start = jnp.where(fresh, jnp.exp2(log_decay), 0)
    to_end = jnp.where(kept, jnp.exp2(log_decay[..., -1:] - log_decay), 0)
    return Rows(dt, log_decay, run, from_start, to_end, from_start[..., -1])


def cut(z: Array, plan: Plan) -> Array:
    """[... T] as [... C L], padded with zeros."""
    z = jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, plan.padding)])
    return z.reshape(*z.shape[:-1], plan.chunks, plan.chunk)


def join(z: Float[Array, "B N C L"], plan: Plan) -> Float[Array, "B T N"]:
    """Undoes `cut`, time before heads again."""
    z = z.reshape(*z.shape[:2], -1)[..., : plan.tokens]
    return jnp.swapaxes(z, 1, 2)


def dlog_decay(
    by_late: Float[Array, "B N C I L"],
    by_early: Float[Array, "B N C I L"],
    from_start: Float[Array, "B N C L"],
    to_end: Float[Array, "B N C L"],
    across: Float[Array, "B N C"],
    plan: Plan,
) -> Float[Array, "B N C L"]:
    """The cotangent of every token's own log decay: the sum of what crosses it.

    A term of the loss goes from one token, or the state before a chunk, to another, or
    the state behind, and has the decays of all tokens in between for factors. Only such
    terms are ever summed, so nothing cancels, however strong the decay.

    Args:
      by_late, by_early: The terms between tokens of a chunk; see `backward.Pairs`.
      from_start: The terms from the state before a chunk, by token.
      to_end: The terms to the state behind a chunk, by token.
      across: The terms from the one state to the other.
    """
    own = (jnp.arange(plan.chunk) // plan.tile)[None, :]
    other = jnp.arange(plan.tiles)[:, None]
    only = lambda mask, z: jnp.where(mask, z, 0)
    # From an earlier tile to this token or behind; from within the tile.
    total = jnp.sum(only(other < own, _up_to_end(only(other < own, by_late))), axis=3)
    total += jnp.sum(only(other == own, by_late), axis=3)
    # From before this token in its tile to a later tile.
    tiles = lambda z: z.reshape(*z.shape[:3], plan.tiles, plan.tile)
    leaving = _before(tiles(jnp.sum(only(other > own, by_early), axis=3)))
    total += leaving.reshape(total.shape)
    return total + _up_to_end(from_start) + _before(to_end) + across[..., None]


def _up_to_end(z: Float[Array, "*X L"]) -> Float[Array, "*X L"]:
    """Sums from each token to the last."""
    return jax.lax.cumsum(z, axis=z.ndim - 1, reverse=True)


def _before(z: Float[Array, "*X L"]) -> Float[Array, "*X L"]:
    """Sums of all tokens before each."""
    sums = jnp.cumsum(z[..., :-1], axis=-1)
    return jnp.pad(sums, [(0, 0)] * (z.ndim - 1) + [(1, 0)])
