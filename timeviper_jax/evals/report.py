"""From scored answers to numbers with intervals, a table, JSON and a picture.

The intervals hold 95 % of 2,000 means over videos drawn with replacement: questions
about one video share its luck.
"""

import dataclasses
import json
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from timeviper_jax.evals.base import Record

_DRAWS = 2000
_MAIN = {"when": "mIoU"}  # The metric that stands for a kind of question.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean over `count` questions, and the interval of `interval`."""

    value: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Estimate):
    """The mean of a metric over the questions of a cell."""

    frames: int
    compression: str
    question: str
    metric: str


def summarise(
    records: Sequence[Record], compression: str, *, seed: int = 0
) -> list[Result]:
    """A result for each length, kind and metric."""
    cells = defaultdict(list)
    for record in records:
        for metric, score in record.scores.items():
            cells[record.frames, record.kind, metric].append((record.video, score))
    return [
        Result(
            frames=frames,
            compression=compression,
            question=kind,
            metric=metric,
            count=len(scores),
            **interval(scores, seed=seed),
        )
        for (frames, kind, metric), scores in sorted(cells.items())
    ]


def interval(scores: Sequence[tuple[str, float]], *, seed: int = 0) -> dict[str, float]:
    """The mean of (video, score) pairs and its bootstrap interval."""
    mean, means = resample(scores, seed=seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": mean, "low": float(low), "high": float(high)}


def resample(
    scores: Sequence[tuple[str, float]], *, seed: int
) -> tuple[float, Float64[np.ndarray, "B"]]:
    """The mean of (video, score) pairs, and means over videos drawn anew."""
    videos, index = np.unique([video for video, _ in scores], return_inverse=True)
    sums = np.bincount(index, weights=[score for _, score in scores])
    counts = np.bincount(index)
    rng = np.random.default_rng(seed)
    n = len(videos)
    times_drawn = rng.multinomial(n, np.full(n, 1 / n), size=_DRAWS)
    means = (times_drawn @ sums) / (times_drawn @ counts)
    return float(sums.sum() / counts.sum()), means


def paired(
    pairs: Sequence[tuple[Sequence[Record], Sequence[Record]]],
    *,
    kind: str,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Ours less theirs on the same questions, by length, over all (ours, theirs)."""
    metric = _MAIN.get(kind, "accuracy")
    cells = defaultdict(list)
    for ours, theirs in pairs:
        other = {r.id: r.scores[metric] for r in theirs if r.kind == kind}
        for r in ours:
            if r.id in other:
                cells[r.frames].append((r.video, r.scores[metric] - other[r.id]))
    return [
        {
            "frames": frames,
            "question": kind,
            "metric": metric,
            "count": len(scores),
            **interval(scores, seed=seed),
        }
        for frames, scores in sorted(cells.items())
    ]


def table(results: Iterable[Result]) -> str:
    """Lines of frames and compression, a column a kind of question."""
    main = [r for r in results if r.metric == _MAIN.get(r.question, "accuracy")]
    kinds = list(dict.fromkeys(r.question for r in main))
    rows = defaultdict(dict)
    for r in main:
        cell = f"{percent(dataclasses.asdict(r))} {r.count}"
        rows[r.frames, r.compression][r.question] = cell
    head = ["frames", "compression"]
    head += [f"{kind} {_MAIN.get(kind, 'accuracy')}" for kind in kinds]
    lines = [head]
    for (frames, compression), cells in sorted(rows.items(), key=lambda row: row[0][0]):
        lines.append(
            [str(frames), compression, *(cells.get(kind, "–") for kind in kinds)]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def percent(result: Mapping[str, Any], digits: int = 1) -> str:
    """A value and its interval, in percent."""
    value, low, high = (100 * result[name] for name in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def write_records(path: pathlib.Path, records: Iterable[Record]) -> None:
    write_json(path, [dataclasses.asdict(record) for record in records])


def read_records(path: pathlib.Path) -> list[Record]:
    return [Record(**values) for values in json.loads(path.read_text("utf-8"))]


def depth_map(
    records: Sequence[Record], kind: str, bins: int = 5
) -> tuple[list[int], np.ndarray]:
    """The lengths, and for each of them and each span of depth the mean score."""
    metric = _MAIN.get(kind, "accuracy")
    mine = [r for r in records if r.kind == kind]
    lengths = sorted({r.frames for r in mine})
    cells = defaultdict(list)
    for r in mine:
        depth = min(int(r.depth * bins), bins - 1)
        cells[depth, lengths.index(r.frames)].append(r.scores[metric])
    grid = np.full((bins, len(lengths)), np.nan)
    for place, scores in cells.items():
        grid[place] = np.mean(scores)
    return lengths, grid


def plot(arms: Mapping[str, Sequence[Record]], path: pathlib.Path) -> None:
    """Curves by length, and below them a map by length and depth for each arm."""
    # Here, because it takes a second that only a report is worth.
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    kinds = [k for k in ("mcq", "when") if any(r.kind == k for r in _all(arms))]
    columns = max(len(arms), len(kinds))
    figure, axes = plt.subplots(
        1 + len(kinds),
        columns,
        figsize=(3.6 * columns, 2.6 * (1 + len(kinds))),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, kind in zip(axes[0], kinds, strict=False):
        _plot_curves(axis, arms, kind)
    for row, kind in zip(axes[1:], kinds, strict=True):
        for axis, (arm, records) in zip(row, arms.items(), strict=False):
            _plot_depths(axis, records, kind, arm)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _all(arms: Mapping[str, Sequence[Record]]) -> list[Record]:
    return [record for records in arms.values() for record in records]


def _plot_curves(axis: Any, arms: Mapping[str, Sequence[Record]], kind: str) -> None:
    metric = _MAIN.get(kind, "accuracy")
    for arm, records in arms.items():
        results = [
            r
            for r in summarise(records, arm)
            if r.question == kind and r.metric == metric
        ]
        x = [r.frames for r in results]
        y = 100 * np.array([r.value for r in results])
        low = 100 * np.array([r.low for r in results])
        high = 100 * np.array([r.high for r in results])
        axis.plot(x, y, marker="o", markersize=4, label=arm)
        axis.fill_between(x, low, high, alpha=0.2)
    axis.set(xscale="log", ylim=(0, 101), title=f"{kind}: {metric}, %")
    axis.set(xlabel="frames")
    axis.set_xticks(sorted({r.frames for r in _all(arms)}), minor=False)
    axis.get_xaxis().set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    axis.set_visible(True)


def _plot_depths(axis: Any, records: Sequence[Record], kind: str, arm: str) -> None:
    lengths, grid = depth_map(records, kind)
    axis.imshow(100 * grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axis.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8
            )
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set_yticks(
        range(len(grid)), [f"{100 * i // len(grid)} %" for i in range(len(grid))]
    )
    axis.set(title=f"{kind}, {arm}", xlabel="frames", ylabel="depth")
    axis.set_visible(True)
