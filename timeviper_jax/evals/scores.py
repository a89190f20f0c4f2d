"""From the answers to a published benchmark to numbers with intervals, and a table.

Intervals hold 95 % of means over videos drawn with replacement (`report.interval`). A
mean of tasks draws within each task.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from timeviper_jax.evals import report
from timeviper_jax.evals.base import Record

_ALL = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(report.Estimate):
    """The mean of a metric over a group of questions: "all", "task=count" and so on."""

    group: str
    metric: str


def summarise(
    records: Sequence[Record],
    groups: Mapping[str, Sequence[str]],
    *,
    mean_of: str = "",
    seed: int = 0,
) -> list[Score]:
    """A score for each group and metric, "all" first.

    Args:
      records: The answers.
      groups: The groups of a question, by its id.
      mean_of: "all" is the mean over the groups that begin so; "": over questions.
      seed: Decides what is drawn for the intervals.
    """
    cells = collections.defaultdict(list)
    for record in records:
        for group in (_ALL, *groups[record.id]):
            for metric, score in record.scores.items():
                cells[group, metric].append((record.video, score))
    scores = [_score(*key, cell, seed) for key, cell in cells.items()]
    if mean_of:
        scores = [
            _mean_of_groups(score, cells, mean_of, seed)
            if score.group == _ALL
            else score
            for score in scores
        ]
    return sorted(scores, key=lambda score: (score.group != _ALL, score.group))


def _score(group: str, metric: str, cell: list, seed: int) -> Score:
    found = report.interval(cell, seed=seed)
    return Score(group=group, metric=metric, count=len(cell), **found)


def _mean_of_groups(score: Score, cells: Mapping, name: str, seed: int) -> Score:
    """The same score, with every group of a name weighing alike."""
    of_group = [
        cell
        for (group, metric), cell in cells.items()
        if metric == score.metric and group.startswith(f"{name}=")
    ]
    found = [report.resample(c, seed=seed + i) for i, c in enumerate(of_group)]
    value = float(np.mean([mean for mean, _ in found]))
    low, high = np.quantile(np.mean([m for _, m in found], axis=0), [0.025, 0.975])
    return dataclasses.replace(score, value=value, low=float(low), high=float(high))


def table(scores: Sequence[Score], main: str) -> str:
    """Lines of a group, its main metric and its questions; then the other metrics."""
    rows = [("group", main, "questions")]
    rows += [
        (s.group, report.percent(dataclasses.asdict(s)), str(s.count))
        for s in scores
        if s.metric == main
    ]
    rest = [s for s in scores if s.group == _ALL and s.metric not in (main, "unparsed")]
    rows += [(f"all, {s.metric}", _plain(s), str(s.count)) for s in rest]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}"
        for row in rows
    )


def _plain(score: Score) -> str:
    """In percent, but for what does not end at 1: CIDEr and a judge's grades."""
    values = dataclasses.asdict(score)
    if score.metric not in ("CIDEr", "score"):
        return report.percent(values)
    return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**values)


def unparsed(records: Sequence[Record]) -> int:
    """Answers in which nothing was found that could be right."""
    return round(sum(record.scores.get("unparsed", 0) for record in records))


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(score) for score in scores]
