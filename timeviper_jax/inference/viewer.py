"""Watches videos once, then answers any number of questions about them.

    viewer = Viewer(model, ViewerConfig())
    memory = viewer.watch([video])
    ids, = viewer.ask(memory, [question], decoding=Decoding(stop_ids=stops))

Questions asked of one memory know nothing of each other. `converse` answers too, and
gives a memory that goes on from there, for a follow-up question.

The language model runs one stretch of layers after another, from each TransV stage to
the next, over the whole video in chunks of one size that carry the caches: what is held
between stretches is the residual of the tokens that are still there. The question
follows the same way, and reads at each stage what was dropped. The result is that of
one pass. A stage that ranks by attention needs the question's last token, so the
stretches from there on wait until one is asked.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Example, Role
from timeviper_jax.inference import held, memory, programs
from timeviper_jax.inference.held import Held
from timeviper_jax.inference.memory import DroppedKV, Memory, Stretch
from timeviper_jax.inference.programs import Answers
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.source import check_features, token_chunks
from timeviper_jax.llm.transv import Stage
from timeviper_jax.timeviper import TimeViper

Layers = tuple[int, int]
OnTokens = Callable[[int, list[int]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewerConfig:
    """The sizes that programs are compiled for; each new one compiles anew.

    Caches hold `smallest_cache` tokens times a power of `cache_growth`.
    """

    video_rows: int = 1  # Videos watched at once.
    question_rows: int = 1  # Questions answered at once.
    chunk: int = 512  # Tokens of a call while watching.
    text_chunk: int = 64  # Tokens of a call while reading a question.
    text_room: int = 256  # Slots kept free for a question and its answer.
    smallest_cache: int = 1024
    cache_growth: int = 4

    def capacity(self, tokens: int) -> int:
        """The cache that holds so many tokens and a question."""
        capacity = self.smallest_cache
        while capacity < tokens + self.text_room:
            capacity *= self.cache_growth
        return capacity


def split_prompt(prompt: EncodedText) -> tuple[EncodedText, EncodedText]:
    """What is watched, up to the last vision token, and what is asked about it."""
    vision = prompt.media_positions
    cut = int(vision[-1]) + 1 if len(vision) else 0
    fields = ("tokens", "roles", "loss_mask")
    parts = [
        {name: getattr(prompt, name)[here] for name in fields}
        for here in (slice(cut), slice(cut, None))
    ]
    return EncodedText(**parts[0]), EncodedText(**parts[1])


class Viewer:
    """A model that watches and answers."""

    def __init__(self, model: TimeViper, cfg: ViewerConfig):
        self.cfg, self._llm = cfg, model.cfg.llm
        sizes, self._params = programs.split_transv(model)
        self._run_on = programs.programs(sizes)
        self._transfers = [
            nnx.split(model.llm.transfer_module(i)) if stage.transfer else None
            for i, stage in enumerate(self._llm.transv)
        ]
        self._feature_dim = model.cfg.projector.vision_dim

    # Watching.

    def watch(self, videos: Sequence[Example]) -> Memory:
        """Reads videos, up to their last vision token, into a memory of a row each.

        Their frames are encoded: `features` holds what `TimeViper.encode` made of them.
        It may be a file mapped to memory, or anything else with a shape whose frames
        `[start:stop]` are given when they are asked for: each once, in order.
        """
        rows = self._rows(len(videos), self.cfg.video_rows, "video_rows")
        chunks, counts = self._embedded(videos, rows)
        length = max((len(video.tokens) for video in videos), default=0)
        first, *_ = self._llm.segments
        ahead = bool(self._llm.transv)
        rest, stretch = self._read_all(first, chunks, rows, length, keep=ahead)
        state = Memory(
            stretches=(stretch,), dropped=(), held=rest, vision_counts=counts
        )
        for stage in self._llm.transv:
            if stage.select == "attention":
                return state
            kept = held.kept_uniform(state.held.roles, counts, stage.keep)
            state = self._pass_stage(state, kept)
        return dataclasses.replace(state, held=None)

    def _rows(self, given: int, rows: int, name: str) -> int:
        if given > rows:
            raise ValueError(f"{given} at once, but {name}={rows}; give fewer.")
        return rows

    def _embedded(
        self, videos: Sequence[Example], rows: int
    ) -> tuple[Iterator[tuple[jax.Array, np.ndarray]], Int[np.ndarray, "B"]]:
        """Chunks of (embeddings, roles), and the vision tokens of each row."""
        counts = np.zeros(rows, int)
        for row, video in enumerate(videos):
            counts[row] = np.count_nonzero(video.roles == Role.VISION)
            check_features(video, self._feature_dim)

        def chunks():
            for c in token_chunks(
                videos,
                rows=rows,
                size=self.cfg.chunk,
                feature_dim=self._feature_dim,
            ):
                x = self._run_on.embed(
                    self._params, c.tokens, c.roles, c.features, c.times
                )
                yield x, c.roles

        return chunks(), counts

    # Stretches of layers.

    def _read_all(
        self,
        layers: Layers,
        chunks: Iterable[tuple[jax.typing.ArrayLike, np.ndarray]],
        rows: int,
        length: int,
        *,
        keep: bool,
    ) -> tuple[Held | None, Stretch]:
        """Whole rows through a stretch from an empty cache; their residual if kept."""
        whole = length + -length % self.cfg.chunk
        capacity = self.cfg.capacity(whole)
        if not any(kind == "attention" for kind, _ in self._llm.layers[slice(*layers)]):
            capacity = None
        slots = capacity or max(self.cfg.chunk, self.cfg.text_chunk)
        stretch = Stretch(
            layers=layers,
            caches=self._run_on.init(self._params, layers, rows, slots),
            used=0,
            capacity=capacity,
        )
        outputs, roles = [], []
        for x, chunk_roles in chunks:
            x, stretch = self._read(x, chunk_roles, stretch)
            if keep:
                outputs.append(x)
                roles.append(chunk_roles)
        if not keep:
            return None, stretch
        if not outputs:
            D = self._llm.embed_dim
            empty = np.zeros((rows, 0), np.int32)
            return Held(x=np.zeros((rows, 0, D), np.float32), roles=empty), stretch
        return _join(outputs, roles), stretch

    def _read(
        self, x: jax.typing.ArrayLike, roles: Int[np.ndarray, "B T"], stretch: Stretch
    ) -> tuple[Float[Array, "B T D"], Stretch]:
        """One chunk through a stretch."""
        stretch.check_room(roles.shape[1])
        segment_ids = (roles != Role.PAD).astype(np.int32)
        x, caches = self._run_on.run(
            self._params, x, segment_ids, stretch.caches, stretch.layers
        )
        used = stretch.used + roles.shape[1]
        return x, dataclasses.replace(stretch, caches=caches, used=used)

    # Stages of TransV.

    def _pass_stage(self, state: Memory, kept: np.ndarray) -> Memory:
        """The memory after the next stage and the stretch of layers behind it."""
        number = len(state.dropped)
        rest, gone = held.split(state.held, kept)
        dropped = self._dropped(number, gone)
        layers = self._llm.segments[number + 1]
        more = number + 1 < len(self._llm.transv)
        chunks = ((c.x, c.roles) for c in rest.chunks(self.cfg.chunk))
        rows, length = rest.roles.shape
        rest, stretch = self._read_all(layers, chunks, rows, length, keep=more)
        return dataclasses.replace(
            state,
            stretches=(*state.stretches, stretch),
            dropped=(*state.dropped, dropped),
            held=rest,
        )

    def _dropped(self, number: int, gone: Held) -> DroppedKV | None:
        """What a stage's transfer will read of the dropped tokens."""
        if self._transfers[number] is None:
            return None
        used = gone.roles.shape[1]
        capacity = self.cfg.capacity(used)
        shape = (len(gone.roles), capacity, self._llm.num_kv_heads, self._llm.head_dim)
        k, v = np.zeros((2, *shape), jnp.dtype(self._llm.dtype))
        for i, chunk in enumerate(gone.chunks(self.cfg.chunk)):
            parts = programs.project_dropped(*self._transfers[number], chunk.x)
            here = slice(i * self.cfg.chunk, (i + 1) * self.cfg.chunk)
            k[:, here], v[:, here] = (
                part[:, : capacity - here.start] for part in map(np.asarray, parts)
            )
        return DroppedKV(
            k=jnp.asarray(k),
            v=jnp.asarray(v),
            valid=jnp.asarray(held.pad(gone.roles != Role.PAD, capacity)),
            used=jnp.asarray(used, jnp.int32),
        )

    def _rank(self, stage: Stage, state: Memory, question: Held) -> np.ndarray:
        """Which tokens stay by what the last instruction token attends to."""
        at = _asking(question.roles)
        asking = np.take_along_axis(question.x, at[:, None, None], axis=1)[:, 0]
        counts = state.held.lengths + at + 1
        logits = [
            np.asarray(
                self._run_on.rank(self._params, c.x, asking, counts, stage.layer)
            )
            for part in (state.held, question)
            for c in part.chunks(self.cfg.chunk)
        ]
        T, U = state.held.roles.shape[1], question.roles.shape[1]
        before = -(-T // self.cfg.chunk) * self.cfg.chunk
        logits = np.concatenate(logits, axis=2)
        logits = np.concatenate(
            [logits[:, :, :T], logits[:, :, before : before + U]], axis=2
        )
        visible = np.concatenate(
            [state.held.roles != Role.PAD, np.arange(U) <= at[:, None]], axis=1
        )
        scores = held.mean_attention(logits, visible)[:, :T]
        return held.kept_best(state.held.roles, state.vision_counts, stage.keep, scores)

    def _transfer(self, number: int, question: Held, dropped: DroppedKV | None) -> Held:
        """The question after it has read what a stage dropped."""
        if dropped is None:
            return question
        receives = question.roles == Role.INSTRUCTION
        if self._llm.transv[number].transfer_to == "all_text":
            receives = question.roles != Role.PAD
        if not receives.any():
            return question
        size = self.cfg.text_chunk
        parts = [
            programs.transfer(
                *self._transfers[number],
                question.x[:, start : start + size],
                receives[:, start : start + size],
                dropped,
            )
            for start in range(0, question.roles.shape[1], size)
        ]
        return dataclasses.replace(
            question, x=np.concatenate(jax.device_get(parts), axis=1)
        )

    # Asking.

    def ask(
        self,
        memory_: Memory,
        questions: Sequence[EncodedText],
        *,
        rows: Sequence[int] | None = None,
        decoding: Decoding,
        seed: int = 0,
        on_tokens: OnTokens | None = None,
    ) -> list[list[int]]:
        """Answers questions, the i-th of them about row `rows[i]` of the memory.

        Args:
          memory_: Is left as it is; ask it again.
          questions: What follows the last vision token, up to where the answer is to
            go on (an answer may have been begun).
          rows: By default one question a row.
          decoding: How tokens are chosen and when to stop.
          seed: Decides what is drawn, where tokens are drawn.
          on_tokens: Is called with (question, new ids) whenever there are some.
        """
        rows = range(len(questions)) if rows is None else rows
        answers = []
        for start in range(0, len(questions), self.cfg.question_rows):
            here = slice(start, start + self.cfg.question_rows)
            listen = on_tokens and (lambda i, ids, s=start: on_tokens(s + i, ids))
            key = jax.random.fold_in(jax.random.key(seed), start)
            some, _ = self._answer(
                memory_, questions[here], rows[here], decoding, key, listen
            )
            answers += some
        return answers

    def converse(
        self,
        memory_: Memory,
        questions: Sequence[EncodedText],
        *,
        rows: Sequence[int] | None = None,
        decoding: Decoding,
        seed: int = 0,
        on_tokens: OnTokens | None = None,
    ) -> tuple[list[list[int]], Memory]:
        """Answers up to `question_rows` questions, and what is then remembered.

        The memory has a row for each question, in their order, with its answer; ask
        it, or converse on with `encode_follow_up`. The video is not read again: later
        turns use what the first question selected, and receive no transfer.

        The arguments are those of `ask`, and `memory_` is left as it is.
        """
        self._rows(len(questions), self.cfg.question_rows, "question_rows")
        rows = range(len(questions)) if rows is None else rows
        key = jax.random.key(seed)
        return self._answer(memory_, questions, rows, decoding, key, on_tokens)

    def logits(
        self,
        memory_: Memory,
        questions: Sequence[EncodedText],
        *,
        rows: Sequence[int] | None = None,
    ) -> Float[np.ndarray, "B vocab"]:
        """The logits of each answer's next token."""
        rows = range(len(questions)) if rows is None else rows
        logits = []
        for start in range(0, len(questions), self.cfg.question_rows):
            here = slice(start, start + self.cfg.question_rows)
            _, hidden = self._read_questions(memory_, questions[here], rows[here])
            some = self._run_on.head(self._params, hidden)
            logits.append(np.asarray(some)[: len(questions[here])])
        return np.concatenate(logits)

    def _answer(
        self,
        memory_: Memory,
        questions: Sequence[EncodedText],
        rows: Sequence[int],
        decoding: Decoding,
        key: jax.Array,
        on_tokens: OnTokens | None,
    ) -> tuple[list[list[int]], Memory]:
        state, hidden = self._read_questions(memory_, questions, rows)
        for stretch in state.stretches:
            stretch.check_room(decoding.max_tokens)
        answers = Answers(
            caches=tuple(stretch.caches for stretch in state.stretches),
            hidden=jnp.asarray(hidden),
            tokens=jnp.full((len(hidden), decoding.max_tokens), -1, jnp.int32),
            done=jnp.arange(len(hidden)) >= len(questions),
            written=jnp.zeros((), jnp.int32),
            key=key,
        )
        texts, answers = self._write(answers, len(questions), decoding, on_tokens)
        written = int(answers.written)
        stretches = tuple(
            dataclasses.replace(stretch, caches=caches, used=stretch.used + written)
            for stretch, caches in zip(state.stretches, answers.caches, strict=True)
        )
        return texts, dataclasses.replace(state, stretches=stretches, asked=True)

    def _read_questions(
        self, memory_: Memory, questions: Sequence[EncodedText], rows: Sequence[int]
    ) -> tuple[Memory, Float[np.ndarray, "B D"]]:
        """A copy of the memory that has read questions, and their last residuals."""
        spare = self.cfg.question_rows - len(questions)
        state = memory.take(memory_, [*rows, *[0] * spare])
        question = self._embed_questions(questions)
        if memory_.asked:
            later = np.where(question.roles == Role.PAD, Role.PAD, Role.TEXT)
            question = dataclasses.replace(question, roles=later.astype(np.int32))
        state, question = self._pass_question(state, question)
        last = np.maximum(question.lengths - 1, 0)
        return state, question.x[np.arange(len(last)), last]

    def _embed_questions(self, questions: Sequence[EncodedText]) -> Held:
        size = self.cfg.text_chunk
        shortest = min(len(question.tokens) for question in questions)
        if not shortest:
            raise ValueError("A question without a token cannot be answered; ask one.")
        length = max(len(question.tokens) for question in questions)
        length += -length % size
        tokens, roles = np.zeros((2, self.cfg.question_rows, length), np.int32)
        for row, question in enumerate(questions):
            tokens[row, : len(question.tokens)] = question.tokens
            roles[row, : len(question.roles)] = question.roles
        parts = [
            self._run_on.embed_text(self._params, tokens[:, start : start + size])
            for start in range(0, length, size)
        ]
        return Held(x=np.concatenate(jax.device_get(parts), axis=1), roles=roles)

    def _pass_question(self, state: Memory, question: Held) -> tuple[Memory, Held]:
        """The question through all layers, and the state behind its last token."""
        stretches = []
        for i in range(len(self._llm.segments)):
            if i:
                if i > len(state.dropped):
                    stage = self._llm.transv[i - 1]
                    if stage.select == "attention":
                        kept = self._rank(stage, state, question)
                    else:
                        kept = held.kept_uniform(
                            state.held.roles, state.vision_counts, stage.keep
                        )
                    state = self._pass_stage(state, kept)
                question = self._transfer(i - 1, question, state.dropped[i - 1])
            outputs, stretch = [], state.stretches[i]
            for chunk in question.chunks(self.cfg.text_chunk):
                x, stretch = self._read(chunk.x, chunk.roles, stretch)
                outputs.append(x)
            stretches.append(stretch)
            x = np.concatenate(jax.device_get(outputs), axis=1)
            question = dataclasses.replace(question, x=x)
        return dataclasses.replace(state, stretches=tuple(stretches)), question

    def _write(
        self,
        answers: Answers,
        count: int,
        decoding: Decoding,
        on_tokens: OnTokens | None,
    ) -> tuple[list[list[int]], Answers]:
        """Decodes to the end, a token at a time where someone listens."""
        texts: list[list[int]] = [[] for _ in range(count)]
        written, step = 0, 1 if on_tokens else decoding.max_tokens
        while written < decoding.max_tokens:
            answers = self._run_on.write(
                self._params,
                answers,
                jnp.asarray(written + step, jnp.int32),
                self._llm.segments,
                decoding,
            )
            tokens, done = np.asarray(answers.tokens), np.asarray(answers.done)
            for i, text in enumerate(texts):
                new = tokens[i, written : written + step]
                new = new[new >= 0].tolist()
                text += new
                if new and on_tokens:
                    on_tokens(i, new)
            written += step
            if done.all():
                break
        return texts, answers


def _join(outputs: Sequence[jax.Array], roles: Sequence[np.ndarray]) -> Held:
    return Held(
        x=np.concatenate(jax.device_get(list(outputs)), axis=1),
        roles=np.concatenate(list(roles), axis=1),
    )


def _asking(roles: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B"]:
    """Where each question's ranking token stands: the last of its instruction.

    Without any it is the last before the answer.
    """
    index = np.arange(roles.shape[1])
    other = (roles != Role.PAD) & (roles != Role.ANSWER)
    order = np.where(other, index, -1)
    order = np.where(roles == Role.INSTRUCTION, index + roles.shape[1], order)
    return np.argmax(order, axis=1)
