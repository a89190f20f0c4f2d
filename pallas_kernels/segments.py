"""Where packed sequences begin: the one rule that every op shares."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a new segment begins: where the id changes, to anything but 0.

    The first position never starts one, it continues what came before this call. Nor
    does padding, whose id is 0: a state outlives the padding behind it.
    """
    before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    return (segment_ids != before) & (segment_ids != 0)
