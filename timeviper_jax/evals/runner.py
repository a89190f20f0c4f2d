"""Asks a benchmark's questions: each video is watched once, then asked all of them."""

import concurrent.futures
import dataclasses
import itertools
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float16
from tqdm import tqdm

from timeviper_jax import sharding
from timeviper_jax.data.ahead import Ahead
from timeviper_jax.data.conversation import EncodedText, encode_prompt
from timeviper_jax.data.examples import Example, Role
from timeviper_jax.data.frames import frame_batches
from timeviper_jax.evals.base import Benchmark, Question, Record
from timeviper_jax.evals.run import Run, decoding_threads
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer, ViewerConfig, split_prompt
from timeviper_jax.training import parameters

Features = Callable[[Question], Float16[np.ndarray, "F V E"]]
# Videos that are watched together, each as the questions about it.
Group = list[list[Question]]
Answered = list[tuple[Question, str]]
Ask = Callable[[Group], Answered]

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

    `features` stand in for the run's own, which the videos must have: see `zeroed`.
    `quiet` leaves progress to the caller.
    """
    questions = benchmark.questions()
    asker = Asker(
        run_,
        features=features or stored(run_),
        sizes=roomy(sizes, run_, questions, max_tokens),
        max_tokens=max_tokens,
    )
    given = {}
    with tqdm(
        total=len(questions), desc=run_.compression, unit="question", disable=quiet
    ) as bar:
        for answered in map(asker, groups(questions, sizes.video_rows)):
            given |= {question.id: text for question, text in answered}
            bar.update(len(answered))
    return [record(question, given[question.id], benchmark) for question in questions]


class Asker:
    """A model that answers groups of questions.

    It writes up to `max_tokens`, or with `likeliest` names the likeliest of a
    question's choices.
    """

    def __init__(
        self,
        run_: Run,
        *,
        features: Features,
        sizes: ViewerConfig,
        max_tokens: int,
        likeliest: bool = False,
    ):
        self._run, self._features, self._likeliest = run_, features, likeliest
        self._viewer = Viewer(run_.model, sizes)
        stops = run_.template.stop_ids(run_.tokenizer)
        self._decoding = Decoding(max_tokens=max_tokens, stop_ids=stops)

    def __call__(self, group: Group) -> Answered:
        asked = [question for same_video in group for question in same_video]
        prompts = {q.id: _prompt(self._run, q) for q in asked}
        memory = self._viewer.watch(
            [_watched(prompts[q[0].id], q[0], self._features) for q in group]
        )
        rows = {q.id: row for row, same in enumerate(group) for q in same}
        # Answers of a kind end together, and no row waits for another.
        asked.sort(key=lambda question: question.kind)
        arguments = dict(rows=[rows[q.id] for q in asked])
        texts = [split_prompt(prompts[q.id])[1] for q in asked]
        if self._likeliest:
            logits = self._viewer.logits(memory, texts, **arguments)
            return [
                (q, self._choose(q, row)) for q, row in zip(asked, logits, strict=True)
            ]
        answers = self._viewer.ask(memory, texts, decoding=self._decoding, **arguments)
        decode = self._run.tokenizer.decode
        return [(q, decode(ids)) for q, ids in zip(asked, answers, strict=True)]

    def loss(self, question: Question, continuation: str) -> tuple[float, bool]:
        """The mean loss of the continuation's tokens; whether all are the likeliest."""
        prompt = _prompt(self._run, question)
        memory = self._viewer.watch([_watched(prompt, question, self._features)])
        _, text = split_prompt(prompt)
        ids = self._run.tokenizer.encode(continuation)
        begun = [_begun(text, ids[:i]) for i in range(len(ids))]
        logits = self._viewer.logits(memory, begun, rows=[0] * len(ids))
        logits = logits.astype(np.float64)
        losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(ids)), ids]
        return float(losses.mean()), bool((logits.argmax(1) == ids).all())

    def _choose(self, question: Question, logits: np.ndarray) -> str:
        """The choice whose first token is the likeliest to come next."""
        ids = [self._run.tokenizer.encode(choice)[0] for choice in question.choices]
        if not ids or len(set(ids)) < len(ids):
            raise ValueError(
                f"Question {question.id} has choices {question.choices}, which do not"
                " begin with a token each; let it be answered in words."
            )
        return question.choices[int(np.argmax(logits[ids]))]


def answer(askers: Sequence[Ask], groups_: Iterable[Group]) -> Iterator[Answered]:
    """The answers to each group, in order; askers share them and work side by side."""
    free = queue.SimpleQueue()
    for asker in askers:
        free.put(asker)

    def one(group: Group) -> Answered:
        asker = free.get()
        try:
            return asker(group)
        finally:
            free.put(asker)

    pool = concurrent.futures.ThreadPoolExecutor(len(askers))
    try:
        yield from pool.map(one, groups_)
    finally:
        pool.shutdown(cancel_futures=True)


def replicas(run_: Run, count: int) -> list[Run]:
    """The run `count` times, each on an equal share of this host's devices."""
    devices = jax.local_devices()
    if count == 1:
        return [run_]
    if count < 1 or len(devices) % count:
        raise ValueError(
            f"{count} replicas do not share {len(devices)} devices evenly; use a"
            " divisor."
        )
    graph, params = parameters.split(run_.model)
    copies = []
    for mine in np.array_split(np.array(devices), count):
        mesh = sharding.make_mesh(fsdp=-1, devices=list(mine))
        placed = jax.device_put(params, sharding.shard_params(params, mesh))
        model = parameters.merge(graph, placed)
        copies.append(dataclasses.replace(run_, model=model, mesh=mesh))
    return copies


def groups(questions: Sequence[Question], size: int) -> list[Group]:
    """`size` videos of like length at a time, each with its questions, shortest first.

    Lengths are alike up to the same power of two. A video at other times is another.
    """
    watched = lambda q: (len(q.times), q.video, q.times.tobytes())
    bucket = lambda same: (len(same[0].times) - 1).bit_length()
    ordered = sorted(questions, key=watched)
    videos = [list(same) for _, same in itertools.groupby(ordered, watched)]
    found = []
    for _, alike in itertools.groupby(videos, bucket):
        alike = list(alike)
        found += [alike[i : i + size] for i in range(0, len(alike), size)]
    return found


def roomy(
    sizes: ViewerConfig, run_: Run, questions: Sequence[Question], max_tokens: int
) -> ViewerConfig:
    """Sizes with room for the longest of the questions and its answer."""
    lengths = [len(split_prompt(_prompt(run_, q))[1].tokens) for q in questions]
    longest = max(lengths, default=0)
    room = longest + -longest % sizes.text_chunk + max_tokens
    return dataclasses.replace(sizes, text_room=max(sizes.text_room, room))


def stored(run_: Run) -> Features:
    """The features that the run keeps of each video."""
    return lambda question: run_.features.at(question.video, question.times)


def sampled(run_: Run) -> Features:
    """Features of just the frames that a question names, encoded when it is asked."""
    encode, size = run_.encoder(), run_.config["data"]["encode_batch"]

    def features(question: Question) -> Float16[np.ndarray, "F V E"]:
        frames = frame_batches(
            question.video,
            question.times,
            run_.model.cfg.fit,
            size=size,
            threads=decoding_threads(),
            limits=run_.limits,
        )
        with Ahead(frames, most=2) as decoded:
            return np.concatenate([encode(batch) for batch in decoded])

    return features


def zeroed(run_: Run) -> Features:
    """A control: nothing to see. What is answered right, the text gave away."""
    return lambda question: np.zeros_like(stored(run_)(question))


def shuffled(run_: Run, questions: Sequence[Question]) -> Features:
    """A control: of each video the frames of another one of the same length.

    Raises:
      ValueError: There is no other one.
    """
    others = {}
    by_length = lambda question: len(question.times)
    for frames, same in itertools.groupby(sorted(questions, key=by_length), by_length):
        videos = list({q.video: q for q in same}.values())
        if len(videos) == 1:
            raise ValueError(
                f"{videos[0].video} is the only video of {frames} frames, so that no"
                " other can be shown instead; ask about more videos, or leave the"
                " controls out."
            )
        for mine, other in zip(videos, videos[1:] + videos[:1], strict=True):
            others[mine.video] = other
    return lambda question: stored(run_)(others[question.video])


def record(question: Question, given: str, benchmark: Benchmark) -> Record:
    """An answer with its score."""
    return Record(
        id=question.id,
        video=question.video,
        frames=len(question.times),
        kind=question.kind,
        depth=question.notes.get("depth"),
        answer=question.answer,
        given=given,
        scores=benchmark.score(question, given),
    )


def _prompt(run_: Run, question: Question) -> EncodedText:
    return encode_prompt(
        question.turns,
        run_.tokenizer,
        run_.template,
        tokens_per_frame=run_.model.cfg.tokens_per_frame,
        answer_prefix=question.answer_prefix,
    )


def _begun(text: EncodedText, ids: Sequence[int]) -> EncodedText:
    """A question whose answer begins with these tokens."""
    more = len(ids)
    return EncodedText(
        tokens=np.append(text.tokens, np.array(ids, np.int32)),
        roles=np.append(text.roles, np.full(more, Role.ANSWER, np.int32)),
        loss_mask=np.append(text.loss_mask, np.zeros(more, bool)),
    )


def _watched(prompt: EncodedText, question: Question, features: Features) -> Example:
    """What is watched before any question: the prompt up to its last frame."""
    before, _ = split_prompt(prompt)
    return Example(
        **{f.name: getattr(before, f.name) for f in dataclasses.fields(before)},
        frame_times=question.times.astype(np.float32),
        features=features(question),
    )
