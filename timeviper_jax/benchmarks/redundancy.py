r"""What it saves not to encode frames that repeat, and what it costs in accuracy.

python -m timeviper_jax.benchmarks.redundancy --workdir runs/demo --data data/needles \
    --json

For each threshold the held-out videos' frames are looked at as `data/redundancy.py`
does, and the needle questions asked twice: with the features of repeats *merged* into
what they repeat, and with repeats *skipped*, each frame that is left at its own time.
Features of frames are those the run has stored, since the encoder sees each frame
alone. Time is that of the frames of one length through the encoder, and of looking for
repeats, in seconds for 1,000 frames of the video; decoding is not in it.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from tqdm import tqdm

from timeviper_jax.benchmarks import command
from timeviper_jax.data.conversation import Media, Turn
from timeviper_jax.data.redundancy import Changes
from timeviper_jax.data.video import read_frames
from timeviper_jax.evals import report, runner
from timeviper_jax.evals import run as runs
from timeviper_jax.evals.base import Question
from timeviper_jax.evals.needles import NeedleBenchmark, grade
from timeviper_jax.inference.encode import Encode, make_encoder
from timeviper_jax.inference.merging import Merging

KINDS = ("mcq", "what", "when")
PORTION = 256  # Frames that are looked at together, as when a video is watched.
BATCH = 32  # Frames that are encoded together, so that what is spared is not padded.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched:
    """Questions about videos of which some frames are merged or skipped."""

    asked: Sequence[Question]
    changed: Mapping[str, Bool[np.ndarray, "F"]]
    skip: bool

    def questions(self) -> list[Question]:
        return [self._skipped(q) if self.skip else q for q in self.asked]

    def score(self, question: Question, given: str) -> dict[str, float]:
        return grade(question, given)

    def _skipped(self, question: Question) -> Question:
        times = question.times[self.changed[question.video]]
        turns = tuple(_with_frames(turn, len(times)) for turn in question.turns)
        return dataclasses.replace(question, times=times, turns=turns)

    def features(self, stored: runner.Features) -> runner.Features:
        """Of each frame, or of the one it repeats."""
        if self.skip:
            return stored

        def merged(question: Question) -> np.ndarray:
            changed = self.changed[question.video]
            return stored(question)[changed][np.cumsum(changed) - 1]

        return merged


def _with_frames(turn: Turn, frames: int) -> Turn:
    content = (Media(frames) if isinstance(c, Media) else c for c in turn.content)
    return dataclasses.replace(turn, content=tuple(content))


def seconds(
    videos: Sequence[UInt8[np.ndarray, "F S S 3"]], encode: Encode, threshold: float
) -> float:
    """The least of three times to encode the videos, a thousand frames."""
    took = []
    for _ in range(3):
        start = time.perf_counter()
        for video in videos:
            merging = Merging(encode, threshold)
            for at in range(0, len(video), PORTION):
                merging(video[at : at + PORTION])
        took.append(time.perf_counter() - start)
    return 1000 * min(took) / sum(map(len, videos))


def measure(
    run_: runs.Run,
    asked: Sequence[Question],
    changed: Mapping[str, Bool[np.ndarray, "F"]],
) -> Iterator[dict[str, Any]]:
    """The scores with repeats merged, and with repeats skipped."""
    for skip in (False, True):
        watched = Watched(asked=asked, changed=changed, skip=skip)
        # Without their repeats hardly two videos are of one length.
        sizes = dataclasses.replace(runner.SIZES, video_rows=1 if skip else 4)
        records = runner.run(
            run_,
            watched,
            features=watched.features(runner.stored(run_)),
            sizes=sizes,
            quiet=True,
        )
        length = len(asked[0].times)
        records = [dataclasses.replace(record, frames=length) for record in records]
        yield {
            "compression": run_.compression,
            "repeats": "skipped" if skip else "merged",
            "scores": [
                dataclasses.asdict(result)
                for result in report.summarise(records, run_.compression)
                if result.metric in ("accuracy", "mIoU")
            ],
        }


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each length, threshold, arm and way to treat repeats."""
    arms = [runs.load(args.workdir / arm) for arm in args.arms]
    model, mesh = arms[0].model, arms[0].mesh
    encode = make_encoder(model, mesh, batch_size=BATCH)
    size = model.cfg.fit.size
    encode(np.zeros((BATCH, size, size, 3), np.uint8))  # Compiled before it is timed.
    bar = tqdm(total=len(args.frames) * len(args.thresholds) * len(arms))
    with bar:
        for length in args.frames:
            asked = questions(args, length)
            runs.encode_missing(arms[0], [question.video for question in asked])
            times = {question.video: question.times for question in asked}
            videos = {p: read_frames(p, t, model.cfg.fit) for p, t in times.items()}
            for threshold in args.thresholds:
                changed = {p: Changes(threshold)(v) for p, v in videos.items()}
                shared = {
                    "frames": length,
                    "threshold": threshold,
                    "saved": 1 - float(np.concatenate([*changed.values()]).mean()),
                    "seconds": seconds([*videos.values()], encode, threshold),
                }
                for arm in arms:
                    bar.set_description(f"{arm.compression}, {length}, {threshold}")
                    for row in measure(arm, asked, changed):
                        yield {**shared, **row}
                    bar.update()


def questions(args: argparse.Namespace, length: int) -> list[Question]:
    """All questions about the first videos of a length."""
    benchmark = NeedleBenchmark(data=str(args.data), frames=(length,), kinds=KINDS)
    asked = benchmark.questions()
    videos = sorted({question.video for question in asked})[: args.max_videos]
    return [question for question in asked if question.video in videos]


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each row; scores in percent."""
    kinds = "".join(f"{kind:>22}" for kind in KINDS)
    yield f"frames  threshold  not encoded  s/1000 frames  repeats  arm   {kinds}"
    for row in rows:
        found = {score["question"]: report.percent(score) for score in row["scores"]}
        yield (
            f"{row['frames']:6}  {row['threshold']:9.3f}  {row['saved']:11.1%}"
            f"  {row['seconds']:13.3f}  {row['repeats']:7}  {row['compression']:6}"
            + "".join(f"{found[kind]:>22}" for kind in KINDS)
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser, many = command.parser(__doc__), command.many
    add, folder = parser.add_argument, pathlib.Path
    add("--workdir", type=folder, default=folder("runs/demo"), help="the runs")
    add("--data", type=folder, default=folder("data/needles"), help="the videos")
    add("--arms", type=many(str), default=("none", "transv"), help="which runs")
    add("--frames", type=many(int), default=(32, 512), help="lengths of videos")
    add("--thresholds", type=many(float), default=(0.0, 0.05, 0.1, 0.2, 0.3, 0.4))
    add("--max_videos", type=int, default=40, help="of each length")
    args, found = command.measure("redundancy", parser, argv, run, table)
    report.write_json(args.workdir / "redundancy.json", found)


if __name__ == "__main__":
    main()
