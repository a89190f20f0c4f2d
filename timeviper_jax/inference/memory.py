"""What is kept of videos that were watched, ready for any number of questions.

A value: asking takes a copy of the rows it needs and leaves the memory as it was.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from timeviper_jax.inference.held import Held
from timeviper_jax.layers.cache import Cache, Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """The caches of a stretch of layers, and how many of their slots are used.

    There is one for each piece of the stretch (see `programs.pieces`). `capacity` is
    None where no layer attends: a state of fixed size holds any number of tokens.
    """

    layers: tuple[int, int]
    caches: tuple[Cache, ...]
    used: int
    capacity: int | None

    def check_room(self, tokens: int) -> None:
        """Raises if `tokens` more do not fit; a full cache overwrites itself."""
        if self.capacity is not None and self.used + tokens > self.capacity:
            raise ValueError(
                f"The cache of layers {self.layers[0]} to {self.layers[1] - 1} holds"
                f" {self.capacity} tokens, {self.used} are in it and {tokens} more are"
                " wanted; watch with a larger text_room."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DroppedKV:
    """Keys and values, for a stage's transfer, of the tokens it dropped."""

    k: Float[Array, "B R K H"]
    v: Float[Array, "B R K H"]
    valid: Bool[Array, "B R"]
    used: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Videos, one a row, as far as the layers could read them without a question.

    `dropped[i]` is for stage i, None where it has no transfer. `held` is the residual
    before the first stage that ranks by attention, which waits for a question; the
    stretches after it are not there yet. `asked` says that a first question was read
    and remembered: what it selected stays, and later turns are only text.
    """

    stretches: tuple[Stretch, ...]
    dropped: tuple[DroppedKV | None, ...]
    held: Held | None
    vision_counts: Int[np.ndarray, "B"]  # Before any stage.
    asked: bool = False

    @property
    def rows(self) -> int:
        return len(self.vision_counts)

    @property
    def num_bytes(self) -> int:
        """What the videos cost to keep."""
        arrays = jax.tree.leaves([[s.caches for s in self.stretches], self.dropped])
        held = self.held.x.nbytes if self.held else 0
        return sum(array.nbytes for array in arrays) + held


@jax.jit
def take_caches(caches: tuple[Cache, ...], rows: Int[Array, "R"]) -> tuple[Cache, ...]:
    """The rows of caches, each as often as it is named."""
    return tuple(_take_cache(cache, rows) for cache in caches)


def _take_cache(cache: Cache, rows: Int[Array, "R"]) -> Cache:
    stacked = lambda tree: jax.tree.map(lambda z: z[:, rows], tree)
    # A copy of `used` too: what is taken is given away to be written over.
    slots = Slots(valid=cache.slots.valid[rows], used=jnp.copy(cache.slots.used))
    return Cache(
        mamba=stacked(cache.mamba), attention=stacked(cache.attention), slots=slots
    )


@jax.jit
def take_dropped(dropped: DroppedKV, rows: Int[Array, "R"]) -> DroppedKV:
    """The rows of dropped tokens, each as often as it is named."""
    return dataclasses.replace(
        dropped, k=dropped.k[rows], v=dropped.v[rows], valid=dropped.valid[rows]
    )


def take(memory: Memory, rows: Sequence[int]) -> Memory:
    """A memory of its own with these rows, each as often as it is named."""
    index = np.asarray(rows, np.int32)
    return dataclasses.replace(
        memory,
        stretches=tuple(
            dataclasses.replace(s, caches=take_caches(s.caches, index))
            for s in memory.stretches
        ),
        dropped=tuple(d and take_dropped(d, index) for d in memory.dropped),
        held=memory.held and memory.held.take(rows),
        vision_counts=memory.vision_counts[index],
    )
