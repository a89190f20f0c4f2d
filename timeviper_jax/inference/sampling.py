"""How the next token is chosen from its logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an answer is written and when it ends.

    `temperature` 0 takes the likeliest token. Otherwise one is drawn among the `top_k`
    likeliest (0: all), and of these among the fewest that make up `top_p` of their
    probability. `stop_ids` end an answer and are not part of it.
    """

    max_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1.")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature} and top_k={self.top_k} must not be"
                f" negative, and top_p={self.top_p} lies above 0 and up to 1."
            )


def sample(
    logits: Float[Array, "B vocab"], key: Key[Array, ""], decoding: Decoding
) -> Int[Array, "B"]:
    """The next token of each row."""
    if not decoding.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / decoding.temperature
    if 0 < decoding.top_k < logits.shape[-1]:
        # So many and no more, where logits in bfloat16 are often equal.
        values, best = jax.lax.top_k(logits, decoding.top_k)
        rows = jnp.arange(len(logits))[:, None]
        logits = jnp.full_like(logits, -jnp.inf).at[rows, best].set(values)
    if decoding.top_p < 1:
        logits = jnp.where(_in_nucleus(logits, decoding.top_p), logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _in_nucleus(
    logits: Float[Array, "B vocab"], top_p: float
) -> Bool[Array, "B vocab"]:
    """Whether the likelier tokens together stay below `top_p`."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    sorted_p = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(sorted_p, axis=-1) - sorted_p
    # Back from the order of likelihood to that of the vocabulary.
    place = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(before < top_p, place, axis=-1)
