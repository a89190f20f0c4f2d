r"""What TransV costs a video without an end, by when it selects: answers, time, memory.

python -m timeviper_jax.benchmarks.open_ended --workdir runs/demo/transv \
    --data data/needles --frames 512,2048 --blocks 64,256 --json

Held-out videos are fed a few frames at a time under each policy of
`inference/open_ended.py`, and asked half-way and at the end. Accuracy is of the end.
How often the answer is that of "exact", and how far the next token's distribution is
from it (total variation), are of both. Times are without compilation: of feeding a
frame, and of a question from its first token to its answer's last. Bytes are of what is
kept for each frame, by part; "residual" waits for a question. Stored features are read,
so that neither decoding nor encoding is in any of it.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from timeviper_jax.benchmarks import command
from timeviper_jax.data.conversation import EncodedText, encode_prompt
from timeviper_jax.evals import report, runner
from timeviper_jax.evals import run as runs
from timeviper_jax.evals.base import Question
from timeviper_jax.evals.needles import NeedleBenchmark
from timeviper_jax.inference.open_ended import (
    OpenEndedConfig,
    OpenEndedVideo,
    split_around,
)
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer

MOMENTS = (0.5, 1.0)
AT_ONCE = 30  # Frames that come together, as from a camera that is read now and then.
MAX_TOKENS = 24
Said = dict[tuple[str, float], tuple[str, Float[np.ndarray, " vocab"]]]


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What a policy said, by question and moment, and what it took."""

    said: Said = dataclasses.field(default_factory=dict)
    feeding: float = 0.0  # Seconds.
    asking: float = 0.0
    frames: int = 0
    kept: dict[str, int] = dataclasses.field(default_factory=dict)


def show(
    run_: runs.Run, viewer: Viewer, policy: OpenEndedConfig, same: runner.Group
) -> Tally:
    """Feeds a video, and asks at each moment all questions about it."""
    asked, tally = same[0], Tally()
    prompts = [split_around(_prompt(run_, question)) for question in asked]
    features = runner.stored(run_)(asked[0])
    video = OpenEndedVideo(viewer, prompts[0][0], policy)
    stops = run_.template.stop_ids(run_.tokenizer)
    decoding = Decoding(max_tokens=MAX_TOKENS, stop_ids=stops)
    for moment in MOMENTS:
        stop = int(moment * len(features))
        start = time.perf_counter()
        while (at := video.num_frames) < stop:
            here = slice(at, min(at + AT_ONCE, stop))
            video.feed(features[here], asked[0].times[here])
        jax.block_until_ready([s.cache for s in video.memory.stretches])
        tally.feeding += time.perf_counter() - start
        for question, (_, text) in zip(asked, prompts, strict=True):
            start = time.perf_counter()
            (ids,) = video.ask([text], decoding=decoding)
            tally.asking += time.perf_counter() - start
            likely = np.asarray(jax.nn.softmax(video.logits([text])[0]))
            said = run_.tokenizer.decode(ids), likely
            tally.said[question.id, moment] = said
    tally.frames = len(features)
    tally.kept = video.memory.parts(filled=True)
    return tally


def _prompt(run_: runs.Run, question: Question) -> EncodedText:
    return encode_prompt(
        question.turns,
        run_.tokenizer,
        run_.template,
        tokens_per_frame=run_.model.cfg.tokens_per_frame,
    )


def measure(
    run_: runs.Run,
    videos: Sequence[runner.Group],
    policy: OpenEndedConfig,
) -> Tally:
    """All videos of one length under one policy."""
    questions = [question for (same,) in videos for question in same]
    sizes = dataclasses.replace(runner.SIZES, question_rows=1)
    viewer = Viewer(run_.model, runner.roomy(sizes, run_, questions, MAX_TOKENS))
    show(run_, viewer, policy, videos[0])  # Compiles.
    total = Tally()
    for video in tqdm(videos, f"{policy.policy} {policy.block_frames}", leave=False):
        tally = show(run_, viewer, policy, video)
        total.said |= tally.said
        total.feeding += tally.feeding
        total.asking += tally.asking
        total.frames += tally.frames
        for part, size in tally.kept.items():
            total.kept[part] = total.kept.get(part, 0) + size
    return total


def row(
    benchmark: NeedleBenchmark,
    questions: Sequence[Question],
    policy: OpenEndedConfig,
    tally: Tally,
    exact: Tally,
) -> dict[str, Any]:
    """A policy's tally, and how far it is from what is exact."""
    records = [
        runner.record(question, tally.said[question.id, 1.0][0], benchmark)
        for question in questions
    ]
    pairs = [(tally.said[key], exact.said[key]) for key in tally.said]
    return {
        "policy": policy.policy,
        "block_frames": policy.block_frames if policy.policy != "exact" else 0,
        "frames": len(questions[0].times),
        "scores": [
            dataclasses.asdict(result)
            for result in report.summarise(records, policy.policy)
            if result.metric in ("accuracy", "mIoU")
        ],
        "same_answers": float(np.mean([one[0] == other[0] for one, other in pairs])),
        "distance": float(
            np.mean([np.abs(one[1] - other[1]).sum() / 2 for one, other in pairs])
        ),
        "answers": len(pairs),
        "feed_seconds_per_frame": tally.feeding / tally.frames,
        "ask_seconds": tally.asking / len(pairs),
        "kept_bytes_per_frame": {
            part: size / tally.frames for part, size in tally.kept.items()
        },
    }


def policies(run_: runs.Run, blocks: Sequence[int]) -> list[OpenEndedConfig]:
    """The exact one first; without TransV there is nothing to select by blocks."""
    stages = run_.model.cfg.llm.transv
    found = [OpenEndedConfig(policy="exact")]
    ranks = any(stage.select == "attention" for stage in stages)
    for name in ("blocks", *(("ranked",) if ranks else ())):
        for block in blocks if stages else ():
            found.append(OpenEndedConfig(policy=name, block_frames=block))
    return found


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each length and policy."""
    run_ = runs.load(args.workdir)
    for length in args.frames:
        benchmark = NeedleBenchmark(data=str(args.data), frames=(length,))
        videos = runner.groups(benchmark.questions(), 1)[: args.max_videos]
        questions = [question for (same,) in videos for question in same]
        runs.encode_missing(run_, [question.video for question in questions])
        exact = None
        for policy in policies(run_, args.blocks):
            tally = measure(run_, videos, policy)
            exact = exact or tally
            yield row(benchmark, questions, policy, tally, exact)


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each row; shares in percent."""
    yield (
        "frames  policy  block  same answer  distance  ms/frame  s/question"
        "  bytes/frame: attention  transfer  residual  scores"
    )
    for found in rows:
        kept = found["kept_bytes_per_frame"]
        scores = "  ".join(
            f"{score['question']} {report.percent(score)}" for score in found["scores"]
        )
        yield (
            f"{found['frames']:6}  {found['policy']:6}  {found['block_frames']:5}"
            f"  {found['same_answers']:11.1%}  {found['distance']:8.4f}"
            f"  {1000 * found['feed_seconds_per_frame']:8.3f}"
            f"  {found['ask_seconds']:10.3f}  {kept['attention']:22.0f}"
            f"  {kept['transfer']:8.0f}  {kept['residual']:8.0f}  {scores}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__)
    add, folder, numbers = parser.add_argument, pathlib.Path, command.many(int)
    add("--workdir", type=folder, required=True, help="the run")
    add("--data", type=folder, default=folder("data/needles"), help="the videos")
    add("--frames", type=numbers, default=(512, 2048), help="lengths of videos")
    add("--blocks", type=numbers, default=(64, 256), help="frames of a block")
    add("--max_videos", type=int, default=20, help="of each length")
    command.measure("open_ended", parser, argv, run, table)


if __name__ == "__main__":
    main()
