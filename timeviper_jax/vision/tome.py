"""Token merging: a frame's many tokens become a few, each the mean of like ones.

https://arxiv.org/abs/2210.09461. Every step pairs even tokens (sources) with odd ones
(destinations) and merges the sources that are most like their best destination. Steps
halve the tokens until `keep` are left. Nothing is learned and every shape is static.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float, Int

Order = Literal["raw", "ascending", "descending"]

# Cosines this near are equal. A few roundings of float32, and far less than what parts
# tokens that are not the same.
_GRAIN = 2.0**-19


def merge_schedule(num_tokens: int, keep: int) -> tuple[int, ...]:
    """How many tokens each step merges away: 729 -> 16 is 364, 182, 91, 46, 23, 7."""
    if not 1 <= keep <= num_tokens:
        raise ValueError(f"{keep=} is outside 1..{num_tokens}, the number of tokens.")
    removed = []
    while num_tokens > keep:
        removed.append(min(num_tokens // 2, num_tokens - keep))
        num_tokens -= removed[-1]
    return tuple(removed)


def merge(
    tokens: Float[Array, "B V E"], keep: int, *, heads: int = 16, order: Order = "raw"
) -> tuple[Float[Array, "B {keep} E"], Float[Array, "B {keep}"]]:
    """Merges V tokens into `keep`, and says how many went into each.

    A merged token is the mean of the tokens in it, taken in float32. Of equally
    similar tokens the earlier one merges first, so the result does not depend on the
    backend.

    Args:
      tokens: An image's features; images do not affect each other.
      keep: Tokens left.
      heads: Tokens are compared by the mean of this many equal parts of them.
      order: "raw" leaves the last step's order: unmerged sources from the most
        similar to the least, then destinations. The others sort by size.
    """
    B, V, E = tokens.shape
    if E % heads:
        raise ValueError(f"Width {E} does not divide into {heads=}.")
    if order not in get_args(Order):
        raise ValueError(f"{order=} is not one of {get_args(Order)}.")
    merged, sizes = tokens.astype(jnp.float32), jnp.ones((B, V), jnp.float32)
    for removed in merge_schedule(V, keep):
        merged, sizes = _merge_step(merged, sizes, removed, heads)
    if order != "raw":
        by_size = jnp.argsort(sizes, stable=True, descending=order == "descending")
        merged = jnp.take_along_axis(merged, by_size[..., None], axis=1)
        sizes = jnp.take_along_axis(sizes, by_size, axis=1)
    return merged.astype(tokens.dtype), sizes


def _merge_step(
    tokens: Float[Array, "B V E"], sizes: Float[Array, "B V"], removed: int, heads: int
) -> tuple[Float[Array, "B X E"], Float[Array, "B X"]]:
    """Merges the `removed` sources that are most like a destination into it."""
    # 1. Each source's best destination, and how alike the two are.
    metric = _metric(jax.lax.stop_gradient(tokens), heads)
    similarity = jnp.einsum(
        "BSE,BDE->BSD",
        metric[:, ::2],
        metric[:, 1::2],
        precision=jax.lax.Precision.HIGHEST,  # A rounding can change the choice.
    )
    # Equals differ by roundings, which are each backend's own: those are taken off.
    similarity = jnp.round(similarity / _GRAIN) * _GRAIN
    best, likeness = similarity.argmax(-1), similarity.max(-1)
    # 2. Where each source goes: the most similar into their destination's place, the
    #    others to the front.
    rank = _rank(likeness)
    num_unmerged = likeness.shape[1] - removed
    place = jnp.where(rank < removed, num_unmerged + best, rank - removed)
    # 3. Sums of what goes to each place, destinations included.
    goes = jax.nn.one_hot(place, tokens.shape[1] - removed)
    sums = _gather_sums(goes, tokens * sizes[..., None])
    sizes = _gather_sums(goes, sizes[..., None])
    return sums / sizes, sizes[..., 0]


def _metric(tokens: Float[Array, "B V E"], heads: int) -> Float[Array, "B V H"]:
    """What tokens are compared by: unit vectors, whose products are cosines."""
    mean = reduce(tokens, "B V (N H) -> B V H", "mean", N=heads)
    norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return mean / jnp.maximum(norm, jnp.finfo(mean.dtype).tiny)


def _rank(values: Float[Array, "B S"]) -> Int[Array, "B S"]:
    """How many values stand before each, in descending order, the earlier of equals
    first. Counting is quadratic, and still faster to compile and run than a sort.
    """
    this, other = values[:, :, None], values[:, None, :]
    earlier = jnp.tri(values.shape[1], k=-1, dtype=bool)  # [this, other]
    return jnp.sum((other > this) | ((other == this) & earlier), -1, dtype=jnp.int32)


def _gather_sums(
    goes: Float[Array, "B S X"], values: Float[Array, "B V E"]
) -> Float[Array, "B X E"]:
    """Adds the sources' values to the destinations', which come last.

    A product with a one-hot matrix: under a thousandth of the encoder's work, and
    unlike a scatter it is fast on every backend and adds in a fixed order.
    """
    sums = jnp.einsum(
        "BSX,BSE->BXE", goes, values[:, ::2], precision=jax.lax.Precision.HIGHEST
    )
    destinations = values[:, 1::2]
    num_unmerged = sums.shape[1] - destinations.shape[1]
    return sums.at[:, num_unmerged:].add(destinations)
