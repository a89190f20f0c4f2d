"""The calls that a `Viewer` makes for one video and one question, in their order.

Nothing is run: arguments are shapes. A test holds the plan to what a viewer does.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from timeviper_jax.benchmarks.prefill.calls import (
    DECODE,
    PROJECTOR,
    QUESTION,
    TRANSV,
    VISION,
    Call,
    Layers,
    Program,
    Setting,
    filled,
    filled_bytes,
    layers_bytes,
    num_bytes,
    part_of,
)
from timeviper_jax.inference import programs
from timeviper_jax.inference.memory import DroppedKV, take_cache
from timeviper_jax.inference.programs import Answers
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.layers.cache import Cache
from timeviper_jax.llm.transv import Stage, Transfer
from timeviper_jax.timeviper import TimeViper


def plan(setting: Setting, place: jax.sharding.Sharding | None = None) -> list[Call]:
    """The calls for one video and its first question, then that for a token more.

    `place` is where all arrays lie: on the chip that the programs are compiled for.
    """
    planner = _Planner(setting, place)
    return [*planner.encode(), *planner.watch(), *planner.ask(), planner.decode()]


def encoder_of(graph: nnx.GraphDef) -> Callable:
    """The program (params, frames) → features of a model, as inference keeps them."""
    return jax.jit(
        lambda params, frames: (
            nnx.merge(graph, params).encode(frames).astype(jnp.float16)
        )
    )


class _Stretch(NamedTuple):
    """Layers, their cache, and the tokens that read through them and that did."""

    layers: Layers
    cache: Cache
    tokens: int
    used: int = 0

    def after(self, slots: int) -> "_Stretch":
        return self._replace(used=self.used + slots)


class _Passage(NamedTuple):
    """What a stage holds back for a chunk and what it drops; `gone` are how many."""

    waiting: jax.ShapeDtypeStruct
    dropped: DroppedKV | None
    gone: int


class _Planner:
    """Goes the way of `Viewer.watch` and `Viewer.ask`, and takes notes."""

    def __init__(self, setting: Setting, place: jax.sharding.Sharding | None):
        self.setting, self.cfg, self.llm = setting, setting.viewer, setting.sizes.llm
        self._place = place
        bare = setting.sizes.with_transv(())
        model = nnx.eval_shape(lambda: TimeViper(bare, rngs=nnx.Rngs(0)))
        self._graph, params = nnx.split(model)
        self.params = self._placed(params)
        self.run_on = programs.programs(bare)
        module = nnx.eval_shape(lambda: Transfer(self.llm.attention, rngs=nnx.Rngs(0)))
        self._transfer_graph, shapes = nnx.split(module)
        self.transfers = [
            self._placed(shapes) if stage.transfer else None
            for stage in self.llm.transv
        ]
        # What is remembered of the video; from when it is asked, also the original.
        self.stretches: list[_Stretch] = []
        self.passages: list[_Passage] = []
        self.memory: tuple = ()

    # What the viewer does.

    def encode(self) -> Iterator[Call]:
        size, pixels = self.setting.batch, self.setting.sizes.vision.image_size
        encode = encoder_of(self._graph)
        frames = self._of(size, pixels, pixels, 3, dtype=jnp.uint8)
        yield self._call(
            VISION,
            f"encode {size} frames",
            Program(function=encode, args=(self.params, frames)),
            times=math.ceil(self.setting.frames / size),
            tokens=self.setting.vision_tokens,
            weights=self.params["vision"],
        )

    def watch(self) -> Iterator[Call]:
        setting, chunk = self.setting, self.cfg.chunk
        tokens = setting.prefix + setting.vision_tokens
        self._open(tokens, setting.vision_tokens)
        ids = self._of(1, chunk, dtype=jnp.int32)
        times = self._of(1, chunk, dtype=jnp.float32)
        dim = setting.sizes.projector.vision_dim
        features = self._of(1, chunk, dim, dtype=jnp.float32)
        args = self.params, ids, ids, features, times
        yield self._call(
            PROJECTOR,
            f"embed {chunk}",
            Program(function=self.run_on.embed, args=args),
            times=math.ceil(tokens / chunk),
            tokens=tokens,
            weights=self.params["projector"],
        )
        yield self._read(0)
        for number in range(len(self.passages)):
            yield from self._pass(number)
            yield self._read(number + 1)

    def ask(self) -> Iterator[Call]:
        yield from self._take()
        size, tokens = self.cfg.text_chunk, self.setting.question
        times = math.ceil(tokens / size)
        ids = self._of(1, size, dtype=jnp.int32)
        yield self._call(
            QUESTION,
            f"embed text {size}",
            Program(function=self.run_on.embed_text, args=(self.params, ids)),
            times=times,
            tokens=tokens,
        )
        for i in range(len(self.llm.segments)):
            if i:
                if i > len(self.passages):
                    yield from self._release()
                yield from self._transfer(i - 1)
            yield self._run(QUESTION, i, size, times=times, tokens=tokens)
            self.stretches[i] = self.stretches[i].after(times * size)
        yield self._call(
            QUESTION,
            "head",
            Program(function=self.run_on.head, args=(self.params, self._hidden())),
            times=1,
            tokens=1,
            weights=self._head(),
        )

    def decode(self) -> Call:
        """One token, after the question: the body of the loop that writes."""
        answers = Answers(
            caches=tuple(stretch.cache for stretch in self.stretches),
            hidden=self._hidden(),
            tokens=self._of(1, self.setting.answer, dtype=jnp.int32),
            done=self._of(1, dtype=jnp.bool_),
            written=self._of(dtype=jnp.int32),
            key=self._placed(jax.eval_shape(lambda: jax.random.key(0))),
        )
        args = self.params, answers, self._of(dtype=jnp.int32)
        static = self.llm.segments, Decoding(max_tokens=self.setting.answer)
        moved, values = num_bytes(self._head()), {}
        for i, stretch in enumerate(self.stretches):
            moved += layers_bytes(self.llm, self.params, stretch.layers)
            moved += filled_bytes(stretch.cache, stretch.used, 1)
            values |= filled(f"[1].caches[{i}]", stretch.cache, stretch.used)
        return Call(
            part=DECODE,
            name="write",
            program=Program(function=self.run_on.write, args=args, after=static),
            times=1,
            tokens=1,
            moved=moved,
            alive=self._alive(),
            values=lambda i: values,
        )

    # Its steps.

    def _open(self, tokens: int, present: int) -> None:
        """A stretch for each stage up to the next that waits, and what is between."""
        self._add_stretch(tokens)
        for stage in self.llm.transv[len(self.passages) :]:
            if stage.select == "attention":
                break
            present = self._add_passage(stage, present)

    def _add_stretch(self, tokens: int) -> None:
        layers, chunk = self.llm.segments[len(self.stretches)], self.cfg.chunk
        slots = max(chunk, self.cfg.text_chunk)
        if any(kind == "attention" for kind, _ in self.llm.layers[slice(*layers)]):
            slots = self.cfg.capacity(math.ceil(tokens / chunk) * chunk)
        shapes = self.run_on.init.eval_shape(self.params, layers, 1, slots)
        cache = self._placed(shapes)
        self.stretches.append(_Stretch(layers, cache, tokens=tokens))

    def _add_passage(self, stage: Stage, present: int) -> int:
        """Returns how many vision tokens go on."""
        kept = int(self.setting.vision_tokens * stage.keep)
        dropped, llm = None, self.llm
        if stage.transfer:
            slots = self.cfg.dropped_capacity(present - kept)
            kv = self._of(1, slots, llm.num_kv_heads, llm.head_dim)
            dropped = DroppedKV(k=kv, v=self._placed(kv), counts=self._counts())
        waiting = self._of(1, self.cfg.chunk, llm.embed_dim)
        self.passages.append(_Passage(waiting, dropped, gone=present - kept))
        self._add_stretch(self.setting.prefix + kept)
        return kept

    def _read(self, number: int) -> Call:
        """All tokens through a stretch, from an empty cache."""
        stretch, chunk = self.stretches[number], self.cfg.chunk
        times = math.ceil(stretch.tokens / chunk)
        sizes = dict(times=times, tokens=stretch.tokens)
        call = self._run(part_of(stretch.layers), number, chunk, **sizes)
        self.stretches[number] = stretch.after(times * chunk)
        return call

    def _run(
        self, part: str, number: int, size: int, *, times: int, tokens: int
    ) -> Call:
        """Chunks of `size` through a stretch, from and to its cache."""
        layers, cache, _, used = self.stretches[number]
        x = self._of(1, size, self.llm.embed_dim)
        args = self.params, x, self._of(1, size, dtype=jnp.int32), cache

        def values(i: int) -> dict[str, Any]:
            real = (np.arange(size)[None] < tokens - i * size).astype(np.int32)
            return {"[2]": real} | filled("[3]", cache, used + i * size)

        weights = layers_bytes(self.llm, self.params, layers)
        return Call(
            part=part,
            name=f"run {layers[0]}-{layers[1] - 1}, {size}",
            program=Program(function=self.run_on.run, args=args, after=(layers,)),
            times=times,
            tokens=tokens,
            moved=times * (weights + 2 * num_bytes(x))
            + filled_bytes(cache, used, size, times),
            alive=self._alive(),
            values=values,
        )

    def _pass(self, number: int) -> Iterator[Call]:
        """Each chunk out of a stretch through the stage behind it."""
        chunk, passage = self.cfg.chunk, self.passages[number]
        before, after = (z.tokens for z in self.stretches[number : number + 2])
        x, index = passage.waiting, self._of(1, chunk, dtype=jnp.int32)
        times = math.ceil(before / chunk)
        yield self._call(
            TRANSV,
            f"regroup {chunk}",
            Program(function=programs.regroup, args=(x, self._placed(x), index)),
            times=times + after // chunk,
            tokens=after,
        )
        if not passage.dropped:
            return
        params, dropped = self.transfers[number], passage.dropped
        args = params, x, index, self._counts(), dropped.k, dropped.v
        graph = self._transfer_graph
        call = self._call(
            TRANSV,
            f"drop {chunk}",
            Program(function=programs.drop, args=args, before=(graph,)),
            times=times,
            tokens=passage.gone,
        )
        # Only what is new is written.
        new = num_bytes((params["k"], params["v"], x))
        new += chunk * num_bytes((dropped.k, dropped.v)) // dropped.capacity
        yield dataclasses.replace(call, moved=times * new)

    def _take(self) -> Iterator[Call]:
        """The copy that reads a question; the memory stays as it is."""
        rows = self._of(1, dtype=jnp.int32)
        self.memory = self._remembered()
        for stretch in self.stretches:
            program = Program(function=take_cache, args=(stretch.cache, rows))
            yield self._call(QUESTION, "copy caches", program, times=1, tokens=0)
        self.stretches = [
            stretch._replace(cache=self._placed(stretch.cache))
            for stretch in self.stretches
        ]
        self.passages = [
            _Passage(self._placed(waiting), dropped and self._placed(dropped), gone)
            for waiting, dropped, gone in self.passages
        ]

    def _release(self) -> Iterator[Call]:
        """Ranks what was held before a stage, and runs what it keeps."""
        number, chunk = len(self.passages), self.cfg.chunk
        stage, held = self.llm.transv[number], self.stretches[number].tokens
        kind, _ = self.llm.layers[stage.layer]
        if stage.select == "attention":
            x = self._of(1, chunk, self.llm.embed_dim)
            args = self.params, x, self._hidden(), self._counts()
            mixer = self.params["llm"][kind]["mixer"]
            sizes = held, self.setting.question
            yield self._call(
                TRANSV,
                f"rank {chunk}",
                Program(function=self.run_on.rank, args=args, after=(stage.layer,)),
                times=sum(math.ceil(size / chunk) for size in sizes),
                tokens=sum(sizes),
                weights=jax.tree.map(
                    lambda z: jax.ShapeDtypeStruct(z.shape[1:], z.dtype),
                    (mixer["q"], mixer["k"]),
                ),
            )
        present = self._add_passage(stage, held - self.setting.prefix)
        for later in self.llm.transv[number + 1 :]:
            if later.select == "attention":
                break
            present = self._add_passage(later, present)
        for i in range(number, len(self.passages)):
            yield from self._pass(i)
            yield self._read(i + 1)

    def _transfer(self, number: int) -> Iterator[Call]:
        passage, params = self.passages[number], self.transfers[number]
        if not passage.dropped:
            return
        size = self.cfg.text_chunk
        text = self._of(1, size, self.llm.embed_dim)
        receives = self._of(1, size, dtype=jnp.bool_)
        args = params, text, receives, passage.dropped
        call = self._call(
            TRANSV,
            f"transfer {size}",
            Program(
                function=programs.transfer, args=args, before=(self._transfer_graph,)
            ),
            times=math.ceil(self.setting.question / size),
            tokens=self.setting.question,
            weights=(params["q"], params["out"]),
        )
        values = {"[3].counts": np.full(1, passage.gone, np.int32)}
        yield dataclasses.replace(call, values=lambda i: values)

    # Shapes and bytes.

    def _call(
        self,
        part: str,
        name: str,
        program: Program,
        *,
        times: int,
        tokens: int,
        weights: Any = (),
    ) -> Call:
        """A call that reads `weights` of its first argument, and all of the others.

        One without weights copies or looks up: it reads as much as it writes.
        """
        moved = num_bytes((weights, program.args[1:], program.outputs()))
        if not weights:
            moved += num_bytes(program.outputs())
        return Call(
            part=part,
            name=name,
            program=program,
            times=times,
            tokens=tokens,
            moved=times * moved,
            alive=self._alive(),
        )

    def _alive(self) -> tuple:
        # The residual on its way to the host, and the one that waits to follow.
        on_the_way = [self._of(1, self.cfg.chunk, self.llm.embed_dim)] * 2
        weights = self.params, self.transfers
        return *weights, self._remembered(), self.memory, self._held(), on_the_way

    def _held(self) -> Any:
        """Residual that waits for a question on the device."""
        waits = len(self.stretches) < len(self.llm.segments)
        if self.cfg.residual_on == "host" or not waits:
            return ()
        return self._of(1, self.stretches[-1].tokens, self.llm.embed_dim)

    def _remembered(self) -> tuple:
        caches = [stretch.cache for stretch in self.stretches]
        return caches, [passage[:2] for passage in self.passages]

    def _head(self) -> Any:
        name = "embed" if self.llm.tied else "head"
        return self.params["llm"][name]

    def _counts(self) -> jax.ShapeDtypeStruct:
        return self._of(1, dtype=jnp.int32)

    def _hidden(self) -> jax.ShapeDtypeStruct:
        return self._of(1, self.llm.embed_dim)

    def _of(self, *shape: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
        dtype = jnp.dtype(dtype or self.llm.dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._place)

    def _placed(self, tree: Any) -> Any:
        """Shapes of their own on the chip."""
        of = lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=self._place)
        return jax.tree.map(of, tree)
