"""Watches videos once, then answers any number of questions about them.

    viewer = Viewer(model, ViewerConfig())
    memory = viewer.watch([video])
    ids, = viewer.ask(memory, [question], decoding=Decoding(stop_ids=stops))

Questions asked of one memory know nothing of each other. `converse` answers too, and
gives a memory that goes on from there, for a follow-up question.

The video goes through stretches of layers, from each TransV stage to the next, in
chunks of one size that carry the caches (`reader.py`). The question follows the same
way, and reads at each stage what was dropped. The result is that of one pass. A stage
that ranks by attention needs the question's last token, so the stretches from there on
wait until one is asked.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Example, Role
from timeviper_jax.inference import memory, programs, selection
from timeviper_jax.inference.held import host
from timeviper_jax.inference.memory import DroppedKV, Memory
from timeviper_jax.inference.programs import Answers
from timeviper_jax.inference.reader import Reader, ViewerConfig, with_stretch
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.source import check_features, pad, token_chunks
from timeviper_jax.timeviper import TimeViper

OnTokens = Callable[[int, list[int]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """Rows of text on its way through the layers, right-padded, on the host."""

    x: Shaped[np.ndarray, "B T D"]
    roles: Int[np.ndarray, "B T"]

    @property
    def lengths(self) -> Int[np.ndarray, "B"]:
        return np.count_nonzero(self.roles, axis=1)

    def chunks(self, size: int) -> Iterator["Questions"]:
        """Consecutive pieces of `size` tokens, the last one padded."""
        for start in range(0, self.roles.shape[1], size):
            here = slice(start, start + size)
            yield Questions(
                x=pad(self.x[:, here], size), roles=pad(self.roles[:, here], size)
            )


def split_prompt(prompt: EncodedText) -> tuple[EncodedText, EncodedText]:
    """What is watched, up to the last vision token, and what is asked about it."""
    vision = prompt.media_positions
    cut = int(vision[-1]) + 1 if len(vision) else 0
    return text_part(prompt, slice(cut)), text_part(prompt, slice(cut, None))


def text_part(text: EncodedText, here: slice) -> EncodedText:
    """Some of a text's tokens."""
    return EncodedText(
        tokens=text.tokens[here], roles=text.roles[here], loss_mask=text.loss_mask[here]
    )


def _check_some(questions: Sequence[EncodedText]) -> None:
    if not questions:
        raise ValueError("No question was given; give at least one.")


class Viewer:
    """A model that watches and answers."""

    def __init__(self, model: TimeViper, cfg: ViewerConfig):
        self.cfg, self._llm = cfg, model.cfg.llm
        self.reader = Reader(model, cfg)

    def watch(self, videos: Sequence[Example]) -> Memory:
        """Reads videos, up to their last vision token, into a memory of a row each.

        Their frames are encoded: `features` holds what `TimeViper.encode` made of them.
        It may be a file mapped to memory, or anything else with a shape whose frames
        `[start:stop]` are given when they are asked for: each once, in order.
        """
        rows = self._rows(len(videos), self.cfg.video_rows, "video_rows")
        text, vision = np.zeros((2, rows), int)
        for row, video in enumerate(videos):
            check_features(video, self.reader.feature_dim)
            vision[row] = np.count_nonzero(video.roles == Role.VISION)
            text[row] = len(video.tokens) - vision[row]
        waits = [stage.select == "attention" for stage in self._llm.transv]
        state = self.reader.begin(text=text, vision=vision, waits=waits)
        for tokens in token_chunks(
            videos,
            rows=rows,
            size=self.cfg.chunk,
            feature_dim=self.reader.feature_dim,
        ):
            state = self.reader.push_tokens(state, tokens)
        return self.reader.finish(state)

    def _rows(self, given: int, rows: int, name: str) -> int:
        if given > rows:
            raise ValueError(f"{given} at once, but {name}={rows}; give fewer.")
        return rows

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
        turns use what the first question selected, and receive a transfer only where
        it goes to all text.

        The arguments are those of `ask`, and `memory_` is left as it is.
        """
        _check_some(questions)
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
        _check_some(questions)
        rows = range(len(questions)) if rows is None else rows
        logits = []
        for start in range(0, len(questions), self.cfg.question_rows):
            here = slice(start, start + self.cfg.question_rows)
            _, hidden = self._read_questions(memory_, questions[here], rows[here])
            some = self.reader.run_on.head(self.reader.params, hidden)
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
            caches=tuple(stretch.cache for stretch in state.stretches),
            hidden=jnp.asarray(hidden),
            tokens=jnp.full((len(hidden), decoding.max_tokens), -1, jnp.int32),
            done=jnp.arange(len(hidden)) >= len(questions),
            written=jnp.zeros((), jnp.int32),
            key=key,
        )
        texts, answers = self._write(answers, len(questions), decoding, on_tokens)
        written = int(answers.written)
        stretches = tuple(
            dataclasses.replace(stretch, cache=cache, used=stretch.used + written)
            for stretch, cache in zip(state.stretches, answers.caches, strict=True)
        )
        return texts, dataclasses.replace(state, stretches=stretches, asked=True)

    def _read_questions(
        self, memory_: Memory, questions: Sequence[EncodedText], rows: Sequence[int]
    ) -> tuple[Memory, Float[np.ndarray, "B D"]]:
        """A copy of the memory that has read questions, and their last residuals."""
        spare = self.cfg.question_rows - len(questions)
        state = self.reader.finish(memory.take(memory_, [*rows, *[0] * spare]))
        question = self._embed_questions(questions)
        if memory_.asked:
            later = np.where(question.roles == Role.PAD, Role.PAD, Role.TEXT)
            question = dataclasses.replace(question, roles=later.astype(np.int32))
        state, question = self._pass_question(state, question)
        last = np.maximum(question.lengths - 1, 0)
        return state, question.x[np.arange(len(last)), last]

    def _embed_questions(self, questions: Sequence[EncodedText]) -> Questions:
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
            self.reader.run_on.embed_text(
                self.reader.params, tokens[:, start : start + size]
            )
            for start in range(0, length, size)
        ]
        return Questions(x=host(parts), roles=roles)

    def _pass_question(
        self, state: Memory, question: Questions
    ) -> tuple[Memory, Questions]:
        """The question through all layers, and the state behind its last token."""
        for number in range(len(self._llm.segments)):
            if number:
                if number > len(state.passages):
                    kept = self._rank(number - 1, state, question)
                    state = self.reader.release(state, kept)
                dropped = state.passages[number - 1].dropped
                question = self._transfer(number - 1, question, dropped)
            outputs, stretch = [], state.stretches[number]
            for chunk in question.chunks(self.cfg.text_chunk):
                x, stretch = self.reader.read(chunk.x, chunk.roles, stretch)
                outputs.append(x)
            state = with_stretch(state, number, stretch)
            question = dataclasses.replace(question, x=host(outputs))
        return state, question

    def _rank(
        self, number: int, state: Memory, question: Questions
    ) -> Bool[np.ndarray, "B T"] | None:
        """Which tokens stay by what the last instruction token attends to."""
        stage = self._llm.transv[number]
        if stage.select != "attention":
            return None
        held, at = state.held, selection.ranking_position(question.roles)
        asking = np.take_along_axis(question.x, at[:, None, None], axis=1)[:, 0]
        roles, U = held.roles, question.roles.shape[1]
        counts = np.count_nonzero(roles, axis=1) + at + 1
        pieces = question.chunks(self.cfg.chunk)
        logits = [
            np.asarray(
                self.reader.run_on.rank(
                    self.reader.params, x, asking, counts, stage.layer
                )
            )
            for x in (*(x for x, _ in held), *(piece.x for piece in pieces))
        ]
        T = roles.shape[1]
        logits = np.concatenate(logits, axis=2)[:, :, : T + U]
        visible = np.concatenate(
            [roles != Role.PAD, np.arange(U) <= at[:, None]], axis=1
        )
        scores = selection.mean_attention(logits, visible)[:, :T]
        return selection.kept_best(roles, state.vision_counts, stage.keep, scores)

    def _transfer(
        self, number: int, question: Questions, dropped: DroppedKV | None
    ) -> Questions:
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
                *self.reader.transfers[number],
                question.x[:, start : start + size],
                receives[:, start : start + size],
                dropped,
            )
            for start in range(0, question.roles.shape[1], size)
        ]
        return dataclasses.replace(question, x=host(parts))

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
            answers = self.reader.run_on.write(
                self.reader.params,
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
