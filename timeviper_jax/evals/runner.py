"""Asks a benchmark's questions: each video is watched once, then asked all of them."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float16
from tqdm import tqdm

from timeviper_jax.data.conversation import EncodedText, encode_prompt
from timeviper_jax.data.examples import Example
from timeviper_jax.evals.base import Benchmark, Question, Record
from timeviper_jax.evals.run import Run
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer, ViewerConfig, split_prompt

Features = Callable[[Question], Float16[np.ndarray, "F V E"]]

# Rows and chunks that suit both a batch of short videos and a few very long ones.
SIZES = ViewerConfig(
    video_rows=4,
    question_rows=8,
    chunk=256,
    text_chunk=64,
    text_room=128,
)


def run(
    run_: Run,
    benchmark: Benchmark,
    *,
    features: Features | None = None,
    sizes: ViewerConfig = SIZES,
    max_tokens: int = 24,
    quiet: bool = False,
) -> list[Record]:
    """Every question of the benchmark, answered and scored.

    `features` stand in for the run's own, which the videos must have: see `controls`.
    `quiet` leaves progress to the caller.
    """
    viewer = Viewer(run_.model, sizes)
    features = features or stored(run_)
    stops = run_.template.stop_ids(run_.tokenizer)
    decoding = Decoding(max_tokens=max_tokens, stop_ids=stops)
    questions = benchmark.questions()
    records = []
    with tqdm(
        total=len(questions), desc=run_.compression, unit="question", disable=quiet
    ) as bar:
        for group in _groups(questions, sizes.video_rows):
            asked = [q for same_video in group for q in same_video]
            prompts = {q.id: _prompt(run_, q) for q in asked}
            memory = viewer.watch(
                [_watched(prompts[q[0].id], q[0], features) for q in group]
            )
            rows = {q.id: row for row, same in enumerate(group) for q in same}
            # Answers of a kind end together, and no row waits for another.
            asked.sort(key=lambda question: question.kind)
            answers = viewer.ask(
                memory,
                [split_prompt(prompts[q.id])[1] for q in asked],
                rows=[rows[q.id] for q in asked],
                decoding=decoding,
            )
            for question, ids in zip(asked, answers, strict=True):
                given = run_.tokenizer.decode(ids)
                records.append(_record(question, given, benchmark))
            bar.update(len(asked))
    order = {question.id: i for i, question in enumerate(questions)}
    return sorted(records, key=lambda record: order[record.id])


def stored(run_: Run) -> Features:
    """The features that the run keeps of each video."""
    return lambda question: run_.features.at(question.video, question.times)


def zeroed(run_: Run) -> Features:
    """A control: nothing to see. What is answered right, the text gave away."""
    return lambda question: np.zeros_like(stored(run_)(question))


def shuffled(run_: Run, questions: Sequence[Question]) -> Features:
    """A control: of each video the frames of another one of the same length."""
    others = {}
    by_length = lambda question: len(question.times)
    for _, same in itertools.groupby(sorted(questions, key=by_length), by_length):
        videos = list({q.video: q for q in same}.values())
        for mine, other in zip(videos, videos[1:] + videos[:1], strict=True):
            others[mine.video] = other
    return lambda question: stored(run_)(others[question.video])


def _groups(questions: Sequence[Question], size: int) -> Iterator[list[list[Question]]]:
    """`size` videos of one length at a time, each with its questions."""
    by_length = lambda q: (len(q.times), q.video)
    ordered = sorted(questions, key=by_length)
    videos = [list(same) for _, same in itertools.groupby(ordered, by_length)]
    lengths = itertools.groupby(videos, lambda same: len(same[0].times))
    for _, same_length in lengths:
        same_length = list(same_length)
        for start in range(0, len(same_length), size):
            yield same_length[start : start + size]


def _prompt(run_: Run, question: Question) -> EncodedText:
    return encode_prompt(
        question.turns,
        run_.tokenizer,
        run_.template,
        tokens_per_frame=run_.model.cfg.tokens_per_frame,
        answer_prefix=question.answer_prefix,
    )


def _watched(prompt: EncodedText, question: Question, features: Features) -> Example:
    """What is watched before any question: the prompt up to its last frame."""
    before, _ = split_prompt(prompt)
    return Example(
        **{f.name: getattr(before, f.name) for f in dataclasses.fields(before)},
        frame_times=question.times.astype(np.float32),
        features=features(question),
    )


def _record(question: Question, given: str, benchmark: Benchmark) -> Record:
    return Record(
        id=question.id,
        video=question.video,
        frames=len(question.times),
        kind=question.kind,
        depth=question.notes["depth"],
        answer=question.answer,
        given=given,
        scores=benchmark.score(question, given),
    )
