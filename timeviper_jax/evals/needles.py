"""The needle questions: what is shown, when, which first, how often.

Choices and counts are right or wrong; moments are graded by how far the span that is
named overlaps the true one.
"""

import dataclasses
import pathlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from timeviper_jax.data import manifest
from timeviper_jax.data.items import Item
from timeviper_jax.data.needle_questions import KINDS
from timeviper_jax.evals.base import Question
from timeviper_jax.evals.spans import parse_span, span_overlap

FRAMES = (32, 512, 2048, 10_240)
OVERLAPS = (0.3, 0.5, 0.7)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleBenchmark:
    """Questions of a split, by length and kind; `max_questions` of each cell, 0: all.

    Which ones is decided by `seed`; they are spread over the videos.
    """

    data: str  # The folder that `timeviper_jax.data.needles` wrote.
    split: str = "heldout"
    frames: tuple[int, ...] = FRAMES
    kinds: tuple[str, ...] = KINDS
    max_questions: int = 0
    seed: int = 0

    def __post_init__(self):
        if unknown := sorted({*self.kinds} - {*KINDS}):
            raise ValueError(f"kinds={unknown} are not among {KINDS}.")

    def questions(self) -> Sequence[Question]:
        where = (("frames", self.frames), ("kind", self.kinds))
        path = pathlib.Path(self.data) / "data.yaml"
        items = manifest.select(manifest.load(path, self.split), where)
        cells = defaultdict(list)
        for item in items:
            cells[item.notes["frames"], item.notes["kind"]].append(item)
        chosen = [item for key in sorted(cells) for item in self._some(cells[key])]
        return [_question(item) for item in chosen]

    def _some(self, items: list[Item]) -> list[Item]:
        if not 0 < self.max_questions < len(items):
            return items
        rng = np.random.default_rng(self.seed)
        index = np.sort(rng.permutation(len(items))[: self.max_questions])
        return [items[i] for i in index]

    def score(self, question: Question, given: str) -> dict[str, float]:
        return grade(question, given)


def _question(item: Item) -> Question:
    (video,) = item.media
    times = item.dataset.sampling.times(
        item.start, item.end, np.random.default_rng(0), capacity=item.notes["frames"]
    )
    *turns, answer = item.turns([len(times)], item.duration, np.random.default_rng(0))
    return Question(
        id=item.id,
        video=video,
        times=times,
        turns=tuple(turns),
        answer="".join(answer.content),
        notes=dict(item.notes),
    )


def grade(question: Question, given: str) -> dict[str, float]:
    """Accuracy, or for "when" the overlap and whether it passes each threshold."""
    if question.kind != "when":
        return {"accuracy": float(given.strip() == question.answer)}
    overlap = span_overlap(parse_span(given), parse_span(question.answer))
    recall = {f"R@1 {low}": float(overlap >= low) for low in OVERLAPS}
    return {"mIoU": overlap, **recall}
