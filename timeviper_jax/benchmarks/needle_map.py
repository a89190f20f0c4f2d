r"""How well a needle is found, by the length of the video and the depth it lies at.

python -m timeviper_jax.benchmarks.needle_map --workdir runs/demo --data data/needles \
    --seeds 3 --json

For each arm of the demo (nothing dropped, plain dropping, TransV at the same rate) and
each seed, the same questions about the same videos: each is put together from encoded
seconds of held-out files (`data/needle_compose.py`), with one needle in it. Answers are
kept in WORKDIR/needle_map as they come, so a stopped run goes on where it was; a run
that was trained anew is asked anew. Written there: `needle_map.json`, and
`needle_map.png`, a map for each kind of question and each arm, all in the same colours.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from timeviper_jax.benchmarks.needles import ARMS, run_name
from timeviper_jax.data.conversation import Media, Turn
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.needle_compose import Composed, Moments
from timeviper_jax.evals import needles, report, runner
from timeviper_jax.evals import run as runs
from timeviper_jax.evals.base import Question, Record

KINDS = ("mcq", "what", "when")
METRICS = {"mcq": "accuracy", "what": "accuracy", "when": "mIoU"}
# Caches of these lengths fit closely, and four rows of 10,240 frames into 2 GiB.
SIZES = dataclasses.replace(runner.SIZES, cache_growth=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """The videos of one length that have their needle at one depth, as a benchmark."""

    frames: int
    depth: float
    videos: tuple[Composed, ...]
    kinds: tuple[str, ...]
    seed: int

    @functools.cached_property
    def by_name(self) -> dict[str, Composed]:
        return {video.name: video for video in self.videos}

    def questions(self) -> list[Question]:
        return [
            _question(video, asked)
            for number, video in enumerate(self.videos)
            for asked in video.ask(
                np.random.default_rng([self.seed, 1, number]), self.kinds
            )
        ]

    def score(self, question: Question, given: str) -> dict[str, float]:
        return needles.grade(question, given)


def _question(video: Composed, asked: Any) -> Question:
    return Question(
        id=f"{video.name}/{video.depth:g}/{asked.kind}",
        video=video.name,
        times=np.arange(video.seconds) + 0.5,
        turns=(Turn("user", (Media(video.seconds), asked.text)),),
        answer=asked.answer,
        notes={"kind": asked.kind, "depth": video.depth},
    )


def make_cells(args: argparse.Namespace) -> list[Cell]:
    """All cells, short videos first; the same for every arm and seed of training."""
    moments = Moments(args.data, args.split)
    return [
        Cell(
            frames=frames,
            depth=depth,
            videos=tuple(
                moments.compose(args.question_seed, number, frames, depth)
                for number in range(-(-count // len(args.depths)))
            ),
            kinds=args.kinds,
            seed=args.question_seed,
        )
        for frames, count in zip(args.frames, args.max_questions, strict=True)
        for depth in args.depths
    ]


# What was answered already.


class Answers:
    """The answers of one run, a line a cell, kept as soon as a cell is done."""

    def __init__(self, path: pathlib.Path, of: str):
        self._path, self._of = path, of
        self._cells: dict[tuple[str, ...], list[Record]] = {}
        if path.exists():
            self._read()

    def get(self, questions: Sequence[Question]) -> list[Record] | None:
        """The answers to exactly these questions, if all are there."""
        return self._cells.get(tuple(question.id for question in questions))

    def put(self, records: Sequence[Record]) -> None:
        line = {"of": self._of, "records": list(map(dataclasses.asdict, records))}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._keep(records)

    def _read(self) -> None:
        text = self._path.read_text("utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # A run that was stopped in the middle of a line.
            self._path.write_text(whole, "utf-8")
        for line in map(json.loads, whole.splitlines()):
            if line["of"] == self._of:
                self._keep([Record(**values) for values in line["records"]])

    def _keep(self, records: Sequence[Record]) -> None:
        self._cells[tuple(record.id for record in records)] = list(records)


def key(model: nnx.Module, args: argparse.Namespace) -> str:
    """Names what is asked of whom: the model, the videos and the questions."""
    path = args.data / "config.json"
    seed = json.loads(path.read_text("utf-8"))["seed"] if path.exists() else 0
    # What it usually is goes unsaid, so that the oldest answers are still found.
    more = (seed,) if seed else ()
    return runs.digest(model, args.question_seed, *more)


# Asking.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What one run is asked, and with what before its eyes."""

    run: str
    cells: tuple[Cell, ...]
    control: str = ""

    @property
    def name(self) -> str:
        return f"{self.run}.{self.control}" if self.control else self.run

    @property
    def frames(self) -> int:
        return sum(cell.frames * len(cell.videos) for cell in self.cells)

    def features(self, store: FeatureStore, cell: Cell) -> runner.Features:
        """The features of a question's video, or what a control puts in their place."""
        videos = self._elsewhere(cell) if self.control == "vision_shuffled" else cell
        found = lambda question: videos.by_name[question.video].features(store)
        if self.control == "text_only":
            return lambda question: np.zeros_like(found(question))
        return found

    def _elsewhere(self, cell: Cell) -> Cell:
        """Each question's video replaced by another, with its needle at another depth.

        At the same depth, a needle of any kind would tell when.
        """
        same = [other for other in self.cells if other.frames == cell.frames]
        other = same[(same.index(cell) + 1) % len(same)]
        videos = [*other.videos[1:], other.videos[0]]
        renamed = [
            dataclasses.replace(video, name=own.name)
            for own, video in zip(cell.videos, videos, strict=True)
        ]
        return dataclasses.replace(cell, videos=tuple(renamed))


def make_tasks(args: argparse.Namespace, cells: Sequence[Cell]) -> list[Task]:
    """The controls are of the first arm, at the shortest length, where it is best."""
    tasks = [
        Task(run=run_name(arm, seed), cells=tuple(cells))
        for seed in range(args.seeds)
        for arm in args.arms
    ]
    easy = tuple(cell for cell in cells if cell.frames == min(args.frames))
    controls = [
        Task(run=args.arms[0], cells=easy, control=control)
        for control in ("text_only", "vision_shuffled")
    ]
    return [*controls, *tasks]


def answer(task: Task, args: argparse.Namespace, bar: tqdm) -> Iterator[Record]:
    """All answers of one run, those it gave before and new ones."""
    run_ = runs.load(args.workdir / task.run)
    path = _out(args) / f"{task.name}.jsonl"
    answers = Answers(path, key(run_.model, args))
    videos = {p.video for c in task.cells for v in c.videos for p in v.pieces}
    runs.encode_missing(run_, videos)
    for cell in task.cells:
        bar.set_description(f"{task.name}, {cell.frames} frames")
        records = answers.get(cell.questions())
        if records is None:
            features = task.features(run_.features, cell)
            records = runner.run(run_, cell, features=features, sizes=SIZES, quiet=True)
            answers.put(records)
        bar.update(cell.frames * len(cell.videos))
        yield from records


def _out(args: argparse.Namespace) -> pathlib.Path:
    """Where answers are kept: those about another split in a folder of their own."""
    name = "needle_map" if args.split == "heldout" else f"needle_map_{args.split}"
    return args.workdir / name


# What came of it.


def by_arm(
    args: argparse.Namespace, answers: Mapping[str, Sequence[Record]]
) -> dict[str, list[Sequence[Record]]]:
    """The answers of each arm, seed by seed."""
    return {
        arm: [answers[run_name(arm, seed)] for seed in range(args.seeds)]
        for arm in args.arms
    }


def _scores(records: Sequence[Record], arm: str) -> list[dict[str, Any]]:
    """The main metric of each length and kind."""
    return [
        dataclasses.asdict(result)
        for result in report.summarise(records, arm)
        if result.metric == METRICS[result.question]
    ]


def summarise(
    args: argparse.Namespace, answers: Mapping[str, Sequence[Record]]
) -> dict[str, Any]:
    """Cells, lengths, differences between arms, controls; shares, not percent."""
    by_seed = by_arm(args, answers)
    cells, lengths = [], []
    for arm, seeds in by_seed.items():
        records = [record for seed in seeds for record in seed]
        lengths += _scores(records, arm)
        for depth in args.depths:
            here = [record for record in records if record.depth == depth]
            cells += [{"depth": depth, **score} for score in _scores(here, arm)]
    pairs = [
        (ours, theirs)
        for ours, theirs in (("transv", "drop"), ("none", "transv"))
        if {ours, theirs} <= {*args.arms}
    ]
    return {
        "command": f"python -m timeviper_jax.benchmarks.needle_map {args.said}",
        "seeds": args.seeds,
        "lengths": lengths,
        "cells": cells,
        "differences": [
            {"ours": ours, "theirs": theirs, **found}
            for ours, theirs in pairs
            for kind in args.kinds
            for found in report.paired(
                list(zip(by_seed[ours], by_seed[theirs], strict=True)), kind=kind
            )
        ],
        "controls": [
            {"control": name.partition(".")[2], **score}
            for name, records in answers.items()
            if "." in name
            for score in _scores(records, name.partition(".")[0])
        ],
    }


def plot(cells: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """A row of maps for each kind of question, in it one for each arm."""
    # Here, because it takes a second that only a report is worth.
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(cell["compression"] for cell in cells))
    kinds = list(dict.fromkeys(cell["question"] for cell in cells))
    figure, axes = plt.subplots(
        len(kinds),
        len(arms),
        figsize=(3.2 * len(arms), 2.2 * len(kinds)),
        squeeze=False,
        layout="constrained",
    )
    for row, kind in zip(axes, kinds, strict=True):
        for axis, arm in zip(row, arms, strict=True):
            mine = [
                c for c in cells if (c["question"], c["compression"]) == (kind, arm)
            ]
            image = _plot_map(axis, mine, f"{kind} ({METRICS[kind]}), {arm}")
    figure.colorbar(image, ax=axes, label="%", shrink=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _plot_map(axis: Any, cells: Sequence[Mapping[str, Any]], title: str) -> Any:
    lengths = sorted({cell["frames"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        place = depths.index(cell["depth"]), lengths.index(cell["frames"])
        grid[place] = 100 * cell["value"]
        axis.text(*place[::-1], f"{grid[place]:.0f}", ha="center", va="center")
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
    axis.set(title=title, xlabel="frames", ylabel="depth")
    return axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What a person wants to see."""
    yield report.table([report.Result(**score) for score in found["lengths"]])
    yield ""
    for row in [*found["differences"], *found["controls"]]:
        what = row.get("control") or f"{row['ours']} − {row['theirs']}"
        yield (
            f"{what}: {row['question']} {row['metric']}, {row['frames']} frames:"
            f" {report.percent(row)} ({row['count']} questions)"
        )


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(","))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, folder = parser.add_argument, pathlib.Path
    integers, words = _numbers(int), _numbers(str)
    add("--workdir", type=folder, default=folder("runs/demo"), help="the runs")
    add("--data", type=folder, default=folder("data/needles"), help="the videos")
    add("--split", default="heldout", help="of the data")
    add("--arms", type=words, default=ARMS, help="the runs that are compared")
    add("--seeds", type=int, default=1, help="trainings of each arm")
    add("--frames", type=integers, default=(32, 128, 512, 2048, 10_240))
    add("--depths", type=_numbers(float), default=(0.0, 0.25, 0.5, 0.75, 1.0))
    add("--kinds", type=words, default=KINDS, help=f"among {KINDS}")
    add(
        "--max_questions",
        type=integers,
        default=(),
        help="of each kind, over all depths: one number, or one for each length; else"
        " 200 up to 1,024 frames, 100 up to 4,096, 40 of longer videos",
    )
    add("--question_seed", type=int, default=0, help="of the videos and questions")
    add("--json", action="store_true", help="print what needle_map.json holds")
    args = parser.parse_args(argv)
    args.said = " ".join(argv)
    _check(parser, args)
    return args


def _affordable(frames: int) -> int:
    return 200 if frames <= 1024 else 100 if frames <= 4096 else 40


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with one line if a flag asks for what there cannot be."""
    if not args.max_questions:
        args.max_questions = tuple(map(_affordable, args.frames))
    if len(args.max_questions) == 1:
        args.max_questions *= len(args.frames)
    if len(args.max_questions) != len(args.frames):
        parser.error(
            f"--max_questions has {len(args.max_questions)} numbers for"
            f" {len(args.frames)} lengths; give one, or one for each."
        )
    if wrong := [depth for depth in args.depths if not 0 <= depth <= 1]:
        parser.error(f"--depths {wrong[0]} is not within 0 to 1.")
    if wrong := [kind for kind in args.kinds if kind not in KINDS]:
        parser.error(f"--kinds {wrong[0]} is not one of {KINDS}.")
    if min(args.frames) < 16:
        parser.error(f"--frames {min(args.frames)} leaves no room; give at least 16.")


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(sys.argv[1:] if argv is None else argv)
    out = _out(args)
    jax.config.update("jax_compilation_cache_dir", str(args.workdir / "compiled"))
    try:
        tasks = make_tasks(args, make_cells(args))
        with tqdm(total=sum(task.frames for task in tasks), unit="frame") as bar:
            answers = {task.name: list(answer(task, args, bar)) for task in tasks}
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    found = summarise(args, answers)
    report.write_json(out / "needle_map.json", found)
    plot(found["cells"], out / "needle_map.png")
    print(json.dumps(found) if args.json else "\n".join(_lines(found)))
    print(f"Written: {out}/needle_map.json, needle_map.png", file=sys.stderr)


if __name__ == "__main__":
    main()
