"""What a stretch of layers remembers of the tokens it has seen. A value, not a place.

A call takes a cache and returns the next one. Shapes are static: attention writes
into slots up to a capacity, the state space keeps one state a layer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaCache:
    """Convolution windows and SSM state; the state is float32 whatever the model is."""

    conv_x: Float[Array, "*M B W X"]
    conv_b: Float[Array, "*M B W Y"]
    conv_c: Float[Array, "*M B W Y"]
    state: Float[Array, "*M B N P S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of past tokens, one slot each; a head's lie side by side.

    That is how matrix products and splash attention read them: in the order in which
    tokens bring them, a compiler copies whole caches to turn them.
    """

    k: Float[Array, "A B K C H"]
    v: Float[Array, "A B K C H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Which slots of the attention caches hold a real token.

    All rows fill slots together, `used` of them so far; a row's padding takes a slot
    that is not `valid`.
    """

    valid: Bool[Array, "B C"]
    used: Int[Array, ""]

    @property
    def lengths(self) -> Int[Array, "B"]:
        """How many real tokens each row holds."""
        return jnp.sum(self.valid, axis=1, dtype=jnp.int32)

    def write(self, valid: Bool[Array, "B T"]) -> "Slots":
        """Takes the next T slots."""
        start = (jnp.zeros_like(self.used), self.used)
        new = jax.lax.dynamic_update_slice(self.valid, valid, start)
        return Slots(valid=new, used=self.used + valid.shape[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """The memory of consecutive layers, stacked by kind as their parameters are."""

    mamba: MambaCache
    attention: KVCache
    slots: Slots

    @property
    def capacity(self) -> int:
        return self.slots.valid.shape[1]

    def check_room(self, tokens: int) -> None:
        """Raises if `tokens` more do not fit; a full cache would overwrite itself.

        How many slots are used is not known while a program is traced: there only what
        can never fit is found, and the caller counts the rest.
        """
        used = self.slots.used
        # States of fixed size hold any number of tokens, in calls that fit the slots.
        counted = self.attention.k.shape[0] and not isinstance(used, jax.core.Tracer)
        used = int(used) if counted else 0
        if used + tokens > self.capacity:
            raise ValueError(
                f"The cache holds {self.capacity} tokens, {used} are in it and {tokens}"
                " more are wanted; make it larger."
            )
