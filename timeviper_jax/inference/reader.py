"""The way of a video's tokens: chunk by chunk through stretches of layers and stages.

A stage keeps or drops each token as it comes out of the stretch before; what it keeps
waits, less than a chunk, for the stretch behind. So all stretches advance together and
no residual is held, except before a stage that must first hear the question: then all
that comes there, until it is asked. Every call is of one chunk; caches that are full
grow to the next capacity. A memory that is read into is given away.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from timeviper_jax.data.examples import Role
from timeviper_jax.inference import programs
from timeviper_jax.inference.held import Held
from timeviper_jax.inference.memory import DroppedKV, Memory, Passage, Stretch
from timeviper_jax.inference.selection import Spread, closed_up, spreads
from timeviper_jax.inference.source import Tokens
from timeviper_jax.timeviper import TimeViper

Layers = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewerConfig:
    """The sizes that programs are compiled for; each new one compiles anew.

    Caches hold `smallest_cache` tokens times a power of `cache_growth`. Residual that
    waits for a question is kept on the host, or on the device that has room for it.
    """

    video_rows: int = 1  # Videos watched at once.
    question_rows: int = 1  # Questions answered at once.
    chunk: int = 512  # Tokens of a call while watching.
    text_chunk: int = 64  # Tokens of a call while reading a question.
    text_room: int = 256  # Slots kept free for a question and its answer.
    smallest_cache: int = 1024
    cache_growth: int = 2
    residual_on: Literal["host", "device"] = "host"

    def capacity(self, tokens: int) -> int:
        """The cache that holds so many tokens and a question."""
        return self._size(tokens + self.text_room)

    def dropped_capacity(self, tokens: int) -> int:
        """The same for dropped tokens, which are written a chunk at a time."""
        return self._size(tokens + self.chunk)

    def _size(self, tokens: int) -> int:
        size = self.smallest_cache
        while size < tokens:
            size *= self.cache_growth
        return size


# For models of billions of parameters: calls that keep a chip busy, caches for hours.
LARGE = ViewerConfig(chunk=8192, text_chunk=256, text_room=1024, smallest_cache=5632)


class Reader:
    """Reads chunks into memories, and runs what was held once it is decided on."""

    def __init__(self, model: TimeViper, cfg: ViewerConfig):
        self.cfg, self.llm = cfg, model.cfg.llm
        self.feature_dim = model.cfg.projector.vision_dim
        self.tokens_per_frame = model.cfg.tokens_per_frame
        sizes, self.params = programs.split_transv(model)
        self.run_on = programs.programs(sizes)
        self.transfers = [
            nnx.split(model.llm.transfer_module(i)) if stage.transfer else None
            for i, stage in enumerate(self.llm.transv)
        ]
        self._behind = None

    # Memories.

    def begin(
        self,
        *,
        text: Int[np.ndarray, "B"],
        vision: Int[np.ndarray, "B"],
        waits: Sequence[bool],
        block: int = 0,
    ) -> Memory:
        """An empty memory of a row for each of `vision`.

        Args:
          text: How many tokens of each row are text.
          vision: And how many are vision tokens. All, or as many as are expected, where
            stages select within blocks or all of them wait.
          waits: For each stage, whether it waits for a question.
          block: Vision tokens within which each stage spreads what it keeps; with 0 it
            spreads it over the whole video.
        """
        per = np.full(len(vision), block) if block else vision
        layers, *_ = self.llm.segments
        tokens = int((text + vision).max(initial=0))
        state = Memory(
            stretches=(self._stretch(layers, len(vision), tokens),),
            passages=(),
            held=None,
            unread=None,
            vision_counts=vision,
        )
        thinned = spreads(self.llm.transv, per, per)
        return self._open(state, thinned, waits, text, vision / np.maximum(per, 1))

    def _open(
        self,
        state: Memory,
        thinned: Sequence[Spread],
        waits: Sequence[bool],
        text: Int[np.ndarray, "B"],
        times: Float[np.ndarray, "B"],
    ) -> Memory:
        """With the passages and stretches up to the next stage that waits.

        There is room for `text` and for what is kept and dropped so many `times`.
        """
        for spread, wait in zip(thinned, waits, strict=True):
            if wait:
                held = Held(on_host=self.cfg.residual_on == "host", rows=state.rows)
                return dataclasses.replace(state, held=held)
            number = len(state.passages)
            kept = np.ceil(times * spread.kept)
            dropped = np.ceil(times * (spread.present - spread.kept))
            passage = self._passage(number, spread, state.rows, int(dropped.max()))
            layers = self.llm.segments[number + 1]
            stretch = self._stretch(layers, state.rows, int((text + kept).max()))
            state = dataclasses.replace(
                state,
                passages=(*state.passages, passage),
                stretches=(*state.stretches, stretch),
            )
        return state

    def _stretch(self, layers: Layers, rows: int, tokens: int) -> Stretch:
        capacity = self.cfg.capacity(tokens + -tokens % self.cfg.chunk)
        if not any(kind == "attention" for kind, _ in self.llm.layers[slice(*layers)]):
            capacity = None
        slots = capacity or max(self.cfg.chunk, self.cfg.text_chunk)
        return Stretch(
            layers=layers,
            cache=self.run_on.init(self.params, layers, rows, slots),
            used=0,
            capacity=capacity,
        )

    def _passage(self, number: int, spread: Spread, rows: int, dropped: int) -> Passage:
        llm, C = self.llm, self.cfg.chunk
        kv = None
        if self.transfers[number] is not None:
            R = self.cfg.dropped_capacity(dropped)
            shape = (rows, R, llm.num_kv_heads, llm.head_dim)
            k, v = (jnp.zeros(shape, llm.dtype) for _ in "kv")
            kv = DroppedKV(k=k, v=v, counts=np.zeros(rows, np.int32))
        return Passage(
            spread=spread,
            seen=np.zeros(rows, int),
            waiting=jnp.zeros((rows, C, llm.embed_dim), llm.dtype),
            roles=np.zeros((rows, C), np.int32),
            dropped=kv,
        )

    # Tokens.

    def push_tokens(self, state: Memory, tokens: Tokens) -> Memory:
        """Reads a chunk, or less of one."""
        tokens = tokens.padded(self.cfg.chunk)
        x = self.run_on.embed(
            self.params,
            tokens.tokens,
            tokens.roles,
            tokens.features.astype(np.float32),
            tokens.times,
        )
        return self._push(state, 0, x, tokens.roles)

    def _push(
        self,
        state: Memory,
        number: int,
        x: Float[Array, "B C D"],
        roles: Int[np.ndarray, "B C"],
    ) -> Memory:
        """A chunk through a stretch, and what is behind it as far as there are chunks.

        Never more than one call runs behind the one that is made ready.
        """
        stretch = state.stretches[number]
        if stretch.capacity:
            capacity = self.cfg.capacity(stretch.used + roles.shape[1])
            if capacity > stretch.capacity:
                stretch = stretch.grown(capacity)
        x, stretch = self.read(x, roles, stretch)
        jax.block_until_ready(self._behind)
        self._behind = x
        state = with_stretch(state, number, stretch)
        if number < len(state.passages):
            passage = state.passages[number]
            kept = passage.spread.keeps(roles, passage.seen)
            return self._pass(state, number, x, roles, kept)
        if state.held is not None:
            held = state.held.append(x, roles)
            return dataclasses.replace(state, held=held)
        return state

    def read(
        self, x: jax.typing.ArrayLike, roles: Int[np.ndarray, "B T"], stretch: Stretch
    ) -> tuple[Float[Array, "B T D"], Stretch]:
        """One call through a stretch that has room for it."""
        stretch.check_room(roles.shape[1])
        segment_ids = (roles != Role.PAD).astype(np.int32)
        x, cache = self.run_on.run(
            self.params, x, segment_ids, stretch.cache, stretch.layers
        )
        used = stretch.used + roles.shape[1]
        return x, dataclasses.replace(stretch, cache=cache, used=used)

    def _pass(
        self,
        state: Memory,
        number: int,
        x: Float[Array, "B C D"],
        roles: Int[np.ndarray, "B C"],
        kept: Bool[np.ndarray, "B C"],
    ) -> Memory:
        """What a stretch made of a chunk, through the stage behind it."""
        passage, C = state.passages[number], self.cfg.chunk
        vision = roles == Role.VISION
        both = np.concatenate([passage.roles != Role.PAD, kept], axis=1)
        index = closed_up(both)
        after = np.where(both, np.concatenate([passage.roles, roles], axis=1), Role.PAD)
        after = np.take_along_axis(after, index, axis=1)
        pick = lambda here: programs.regroup(passage.waiting, x, index[:, here])
        first, rest = slice(C), slice(C, None)
        full = after[:, C - 1].any()
        here = rest if full else first
        passages = list(state.passages)
        passages[number] = dataclasses.replace(
            passage,
            seen=passage.seen + vision.sum(axis=1),
            waiting=pick(here),
            roles=after[:, here],
            dropped=self._drop(number, x, vision & ~kept, passage.dropped),
        )
        state = dataclasses.replace(state, passages=tuple(passages))
        if full:
            state = self._push(state, number + 1, pick(first), after[:, first])
        return state

    def _drop(
        self,
        number: int,
        x: Float[Array, "B C D"],
        gone: Bool[np.ndarray, "B C"],
        dropped: DroppedKV | None,
    ) -> DroppedKV | None:
        """With the keys and values that a transfer will read of what is gone."""
        if dropped is None or not gone.any():
            return dropped
        capacity = self.cfg.dropped_capacity(int(dropped.counts.max()))
        if capacity > dropped.capacity:
            dropped = dropped.grown(capacity)
        k, v = programs.drop(
            *self.transfers[number],
            x,
            closed_up(gone),
            dropped.counts,
            dropped.k,
            dropped.v,
        )
        counts = dropped.counts + gone.sum(axis=1, dtype=np.int32)
        return DroppedKV(k=k, v=v, counts=counts)

    def finish(self, state: Memory) -> Memory:
        """Reads what is too little for a chunk; more after it would begin a new one."""
        if state.unread is not None:
            unread, state = state.unread, dataclasses.replace(state, unread=None)
            state = self.push_tokens(state, unread)
        for number in range(len(state.passages)):
            passage = state.passages[number]
            if passage.roles.any():
                passages = list(state.passages)
                passages[number] = dataclasses.replace(
                    passage, roles=np.zeros_like(passage.roles)
                )
                state = dataclasses.replace(state, passages=tuple(passages))
                state = self._push(state, number + 1, passage.waiting, passage.roles)
        return state

    def release(self, state: Memory, kept: Bool[np.ndarray, "B T"] | None) -> Memory:
        """Runs what was held before a stage, of which it keeps `kept`.

        None keeps what an even spread does. It stops at the next stage that ranks.
        """
        number, held, roles = len(state.passages), state.held, state.held.roles
        stages = self.llm.transv[number:]
        present = np.count_nonzero(roles == Role.VISION, axis=1)
        text = np.count_nonzero(roles, axis=1) - present
        thinned = spreads(stages, state.vision_counts, present)
        waits = [False, *(stage.select == "attention" for stage in stages[1:])]
        if kept is None:
            kept = thinned[0].keeps(roles, np.zeros_like(present))
        state = dataclasses.replace(state, held=None)
        state = self._open(state, thinned, waits, text, np.ones(len(text)))
        C = self.cfg.chunk
        for i, (x, chunk_roles) in enumerate(held):
            here = kept[:, i * C : (i + 1) * C]
            state = self._pass(state, number, jnp.asarray(x), chunk_roles, here)
        return self.finish(state)


def with_stretch(state: Memory, number: int, stretch: Stretch) -> Memory:
    """The memory with another stretch in this place."""
    before, after = state.stretches[:number], state.stretches[number + 1 :]
    return dataclasses.replace(state, stretches=(*before, stretch, *after))
