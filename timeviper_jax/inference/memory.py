"""What is kept of videos that were watched, ready for any number of questions.

A value: asking takes a copy of the rows it needs and leaves the memory as it was.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from timeviper_jax.inference.held import Held
from timeviper_jax.inference.selection import Spread
from timeviper_jax.inference.source import Tokens
from timeviper_jax.layers.cache import Cache, KVCache, Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """The cache of a stretch of layers, and how many of its slots are used.

    `capacity` is None where no layer attends: a state of fixed size holds any number of
    tokens.
    """

    layers: tuple[int, int]
    cache: Cache
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

    def grown(self, capacity: int) -> "Stretch":
        """A larger one with the same content; this one's slots are given away."""
        cache = _grown(self.cache, capacity)
        return dataclasses.replace(self, cache=cache, capacity=capacity)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DroppedKV:
    """Keys and values, for a stage's transfer, of the tokens it dropped so far."""

    k: Float[Array, "B R K H"]
    v: Float[Array, "B R K H"]
    counts: Int[Any, "B"]  # On the host between programs.

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def grown(self, capacity: int) -> "DroppedKV":
        """A larger one with the same content; this one's arrays are given away."""
        k, v = (_longer(z, axis=1, length=capacity) for z in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """What a stage of TransV has let through and dropped so far.

    `waiting` are tokens that it kept, too few yet for a chunk through the next stretch.
    """

    spread: Spread
    seen: Int[np.ndarray, "B"]  # Vision tokens, kept or not.
    waiting: Float[Array, "B C D"]
    roles: Int[np.ndarray, "B C"]
    dropped: DroppedKV | None  # None where nothing is transferred.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Videos, one a row, as far as the layers could read them without a question.

    Between each stretch and the next is a passage. `held` is the residual before the
    first stage that waits for a question; the stretches after it are not there yet.
    `unread` are tokens too few for a chunk through the first stretch. `asked` says that
    a first question was read and remembered: what it selected stays, and later turns
    are only text.
    """

    stretches: tuple[Stretch, ...]
    passages: tuple[Passage, ...]
    held: Held | None
    unread: Tokens | None
    vision_counts: Int[np.ndarray, "B"]  # Before any stage.
    asked: bool = False

    @property
    def rows(self) -> int:
        return len(self.vision_counts)

    @property
    def waits(self) -> bool:
        """Whether there are tokens that wait for a whole chunk."""
        unread = self.unread is not None and self.unread.length > 0
        return unread or any(passage.roles.any() for passage in self.passages)

    @property
    def num_bytes(self) -> int:
        """What the videos cost to keep."""
        return sum(self.parts().values())

    def parts(self, *, filled: bool = False) -> dict[str, int]:
        """Bytes of each part, which grow with the video, all but the states.

        Caches are larger than what is in them; `filled` counts that alone.
        """
        parts = dict(attention=0, transfer=0, residual=0, states=0)
        for stretch in self.stretches:
            share = stretch.used / stretch.capacity if stretch.capacity else 0
            slots = _bytes((stretch.cache.attention, stretch.cache.slots.valid))
            parts["attention"] += int(share * slots) if filled else slots
            parts["states"] += _bytes(stretch.cache.mamba)
        for passage in self.passages:
            parts["states"] += _bytes(passage.waiting)
            if passage.dropped:
                kv = (passage.dropped.k, passage.dropped.v)
                share = passage.dropped.counts.mean() / passage.dropped.capacity
                parts["transfer"] += int((share if filled else 1) * _bytes(kv))
        if self.held:
            parts["residual"] = self.held.num_bytes
        return parts


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def _grown(cache: Cache, capacity: int) -> Cache:
    attention, slots = cache.attention, cache.slots
    return dataclasses.replace(
        cache,
        attention=KVCache(
            k=_longer(attention.k, axis=3, length=capacity),
            v=_longer(attention.v, axis=3, length=capacity),
        ),
        slots=dataclasses.replace(
            slots, valid=_longer(slots.valid, axis=1, length=capacity)
        ),
    )


def _longer(z: Array, *, axis: int, length: int) -> Array:
    """Zeros after the end of an axis; the array itself is freed at once."""
    widths = [(0, 0)] * z.ndim
    widths[axis] = (0, length - z.shape[axis])
    longer = jax.block_until_ready(jnp.pad(z, widths))
    z.delete()
    return longer


@jax.jit
def take_cache(cache: Cache, rows: Int[Array, "R"]) -> Cache:
    """The rows of a cache, each as often as it is named."""
    stacked = lambda tree: jax.tree.map(lambda z: z[:, rows], tree)
    # A copy of `used` too: what is taken is given away to be written over.
    slots = Slots(valid=cache.slots.valid[rows], used=jnp.copy(cache.slots.used))
    return Cache(
        mamba=stacked(cache.mamba), attention=stacked(cache.attention), slots=slots
    )


@jax.jit
def _take(arrays: Any, rows: Int[Array, "R"]) -> Any:
    return jax.tree.map(lambda z: z[rows], arrays)


def _take_passage(passage: Passage, rows: Int[np.ndarray, "R"], share: bool) -> Passage:
    spread, dropped = passage.spread, passage.dropped
    if dropped and not share:
        k, v = _take((dropped.k, dropped.v), rows)
        dropped = DroppedKV(k=k, v=v, counts=dropped.counts[rows])
    return Passage(
        spread=Spread(present=spread.present[rows], kept=spread.kept[rows]),
        seen=passage.seen[rows],
        waiting=_take(passage.waiting, rows),
        roles=passage.roles[rows],
        dropped=dropped,
    )


def take(memory: Memory, rows: Sequence[int]) -> Memory:
    """A memory of its own with these rows, each as often as it is named."""
    index = np.asarray(rows, np.int32)
    # What nothing more is written to is only read, and needs no copy. A video without
    # an end, whose `unread` may be empty but is there, will be written to.
    ended = memory.unread is None and not memory.waits
    share = ended and list(rows) == list(range(memory.rows))
    return dataclasses.replace(
        memory,
        stretches=tuple(
            dataclasses.replace(s, cache=take_cache(s.cache, index))
            for s in memory.stretches
        ),
        passages=tuple(_take_passage(p, index, share) for p in memory.passages),
        held=memory.held and memory.held.take(rows),
        unread=memory.unread and memory.unread.take(rows),
        vision_counts=memory.vision_counts[index],
    )
