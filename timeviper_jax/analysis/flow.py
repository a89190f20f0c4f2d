r"""Through which layers what was seen reaches the answer, on the needle questions.

python -m timeviper_jax.analysis.flow --workdir runs/demo/none --data data/needles \
    --json --out runs/demo/none/flow

The third finding of https://arxiv.org/abs/2511.16595, for any checkpoint. From each
layer on, instruction tokens, or those from which the answer is written, or both, no
longer see vision tokens (`blocking.py` says what that is in a Mamba-2 layer); and all
vision tokens leave before each layer. An answer counts where every token of it is the
likeliest one after the true ones before it, which is when greedy decoding writes it.
"From which the answer is written" are the last token of the prompt and the answer's.

`flow.json` holds every accuracy with a 95 % interval over videos, `flow.png` the
curves.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int
from tqdm import tqdm

from timeviper_jax.analysis import plots
from timeviper_jax.analysis.blocking import Cuts, run_cut
from timeviper_jax.analysis.plots import DROPPED, Point
from timeviper_jax.data.conversation import Turn, encode
from timeviper_jax.data.examples import Batch, Example, Role, RowSize, collate
from timeviper_jax.data.needle_questions import KINDS
from timeviper_jax.evals import report
from timeviper_jax.evals import run as runs
from timeviper_jax.evals.base import Question
from timeviper_jax.evals.needles import NeedleBenchmark
from timeviper_jax.llm.stream import take
from timeviper_jax.timeviper import TimeViper

# Who sees no vision from a layer on.
ROUTES = ("instruction", "answer", "instruction and answer")
_NEVER = 1 << 20  # A layer that is not there.
_ROUNDED = 16  # Rows are as long as the longest question, up to a multiple of it.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A batch of answered questions: where each answer is written, and its tokens."""

    batch: Batch
    at: Int[np.ndarray, "B A"]
    targets: Int[np.ndarray, "B A"]  # -1 after the last one.

    def receivers(self, cut: str) -> Bool[np.ndarray, "B T"]:
        """The tokens that are to see no vision."""
        writes = np.zeros(self.batch.roles.shape, bool)
        row, column = np.nonzero(self.targets >= 0)
        writes[row, self.at[row, column]] = True
        instruction = (self.batch.roles == Role.INSTRUCTION) & ~writes
        found = {
            "instruction": instruction,
            "answer": writes,
            "instruction and answer": instruction | writes,
        }
        return found.get(cut, np.zeros_like(writes))


def example(run_: runs.Run, question: Question) -> Example:
    """The question with its true answer."""
    text = encode(
        (*question.turns, Turn("assistant", (question.answer,))),
        run_.tokenizer,
        run_.template,
        tokens_per_frame=run_.model.cfg.tokens_per_frame,
    )
    return Example(
        tokens=text.tokens,
        roles=text.roles,
        loss_mask=text.loss_mask,
        frame_times=question.times.astype(np.float32),
        features=run_.features.at(question.video, question.times).astype(np.float32),
    )


def batches(
    examples: Sequence[Example], rows: int, tokens_per_frame: int
) -> Iterator[Asked]:
    """All of one shape; the last one's spare rows repeat its first example."""
    text = max(example.num_text_tokens for example in examples)
    size = RowSize(
        num_frames=max(example.num_frames for example in examples),
        text_tokens=text + -text % _ROUNDED,
        tokens_per_frame=tokens_per_frame,
    )
    most = max(np.count_nonzero(example.loss_mask) for example in examples)
    for start in range(0, len(examples), rows):
        here = list(examples[start : start + rows])
        here += here[:1] * (rows - len(here))
        at, targets = np.full((2, rows, most), -1, np.int32)
        for row, one in enumerate(here):
            positions = np.flatnonzero(one.loss_mask)
            at[row, : len(positions)] = positions - 1
            targets[row, : len(positions)] = one.tokens[positions]
        batch = collate([[one] for one in here], size)
        yield Asked(batch=batch, at=np.maximum(at, 0), targets=targets)


@functools.partial(jax.jit, static_argnums=0)
def _right(
    graph: nnx.GraphDef,
    params: nnx.State,
    batch: Batch,
    at: Int[Array, "B A"],
    targets: Int[Array, "B A"],
    cuts: Cuts,
) -> Bool[Array, "B"]:
    """Whether each answer is the likeliest one, token by token."""
    model: TimeViper = nnx.merge(graph, params)
    before = model.embed(batch)
    after = run_cut(model.llm, before, cuts)
    # Where each token of the row stands now.
    T, U = before.x.shape[1], after.x.shape[1]
    places = jnp.where(after.positions >= 0, after.positions, T)
    now = jax.vmap(lambda p: jnp.zeros(T, jnp.int32).at[p].set(jnp.arange(U)))(places)
    logits = model.llm.logits(take(after.x, take(now, at)))
    return jnp.all((jnp.argmax(logits, axis=-1) == targets) | (targets < 0), axis=1)


def answered(
    model: TimeViper, asked: Asked, cut: str = DROPPED, layer: int = _NEVER
) -> Bool[np.ndarray, "B"]:
    """Whether each question is answered where something is cut from `layer` on."""
    graph, params = nnx.split(model)
    at, never = jnp.int32(layer), jnp.int32(_NEVER)
    cuts = Cuts(
        receivers=jnp.asarray(asked.receivers(cut)),
        blocked_from=never if cut == DROPPED else at,
        dropped_at=at if cut == DROPPED else never,
    )
    right = _right(graph, params, asked.batch, asked.at, asked.targets, cuts)
    return np.asarray(right)


def depths(pattern: str) -> list[int]:
    """The layers that mix tokens, and behind the last layer.

    To cut before an MLP is to cut before the layer after it.
    """
    return [i for i, kind in enumerate(pattern) if kind != "-"] + [len(pattern)]


def measure(
    run_: runs.Run, questions: Sequence[Question], *, rows: int, seed: int = 0
) -> list[Point]:
    """The accuracy of every cut at every depth."""
    model = run_.model
    examples = [example(run_, question) for question in questions]
    asked = list(batches(examples, rows, model.cfg.tokens_per_frame))
    layers = depths(model.cfg.llm.pattern)
    points = []
    with tqdm(
        total=(len(ROUTES) + 1) * (len(layers) - 1) + 1, unit="cut", disable=None
    ) as bar:
        uncut = _answers(model, asked, DROPPED, layers[-1], len(questions))
        bar.update()
        for cut in (*ROUTES, DROPPED):
            for layer in layers:
                right = uncut
                if layer < layers[-1]:
                    right = _answers(model, asked, cut, layer, len(questions))
                    bar.update()
                points += _points(cut, layer, questions, right, seed)
    return points


def _answers(
    model: TimeViper, asked: Sequence[Asked], cut: str, layer: int, count: int
) -> Bool[np.ndarray, " questions"]:
    parts = [answered(model, batch, cut, layer) for batch in asked]
    return np.concatenate(parts)[:count]


def _points(
    cut: str,
    layer: int,
    questions: Sequence[Question],
    right: Bool[np.ndarray, " questions"],
    seed: int,
) -> Iterator[Point]:
    for kind in sorted({question.kind for question in questions}):
        scores = [
            (question.video, float(score))
            for question, score in zip(questions, right, strict=True)
            if question.kind == kind
        ]
        found = report.interval(scores, seed=seed)
        yield Point(cut=cut, layer=layer, kind=kind, count=len(scores), **found)


def table(points: Sequence[Point]) -> str:
    """A line for each cut and kind: accuracy in percent by layer."""
    layers = sorted({point.layer for point in points})
    cells = {(p.cut, p.kind, p.layer): f"{100 * p.value:.1f}" for p in points}
    lines = [["from layer", "", *map(str, layers)]]
    for cut, kind in dict.fromkeys((p.cut, p.kind) for p in points):
        values = [cells[cut, kind, layer] for layer in layers]
        lines.append([cut, kind, *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    benchmark = NeedleBenchmark(
        data=args.data,
        split=args.split,
        frames=(args.frames,),
        kinds=tuple(args.kinds.split(",")),
        max_questions=args.max_questions,
        seed=args.seed,
    )
    try:
        questions = benchmark.questions()
        run_ = runs.load(args.workdir)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    if not questions:
        sys.exit(
            f"error: {args.data} has no questions about {args.frames} frames of these"
            f" kinds ({args.kinds}); choose other --frames or --kinds."
        )
    runs.encode_missing(run_, [question.video for question in questions])
    points = measure(run_, questions, rows=args.rows, seed=args.seed)
    pattern = run_.model.cfg.llm.pattern
    found = {
        "workdir": args.workdir,
        "pattern": pattern,
        "transv": [dataclasses.asdict(s) for s in run_.model.cfg.llm.transv],
        "frames": args.frames,
        "questions": len(questions),
        "points": [dataclasses.asdict(point) for point in points],
    }
    report.write_json(args.out / "flow.json", found)
    plots.save(plots.depth_curves(points, pattern), args.out / "flow.png")
    print(json.dumps(found) if args.json else table(points))
    print(f"Written: {args.out}/flow.json, flow.png", file=sys.stderr)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--workdir", required=True, help="the run whose latest checkpoint is meant")
    add("--data", default="data/needles", help="the needle data")
    add("--split", default="heldout")
    add("--frames", type=int, default=32, help="the length of the videos")
    add("--kinds", default="mcq,what,when", help=f"of {','.join(KINDS)}")
    add("--max_questions", type=int, default=100, help="of each kind; 0 for all")
    add("--rows", type=int, default=20, help="questions answered at once")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, required=True, help="where to write")
    add("--json", action="store_true", help="print flow.json instead of a table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
