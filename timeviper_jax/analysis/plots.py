"""Pictures of maps over frames, of curves over layers, of what TransV keeps."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8

from timeviper_jax.evals.report import Estimate

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402 (after its backend is chosen)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.offsetbox import AnnotationBbox, OffsetImage  # noqa: E402

DROPPED = "dropped"
DPI = 80
_COLUMNS = 512  # Of a picture over frames: fewer than its points.
Thumbnails = Mapping[int, UInt8[np.ndarray, "H W 3"]]  # By the frame they show.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point(Estimate):
    """The accuracy on questions of a kind where something is cut from `layer` on.

    `cut` says who sees no vision, or is DROPPED where all of it leaves. The layer
    behind the last one cuts nothing.
    """

    cut: str
    layer: int
    kind: str


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure, and is done with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def depth_curves(points: Sequence[Point], pattern: str) -> Figure:
    """Accuracy by the layer from which on something is cut, a panel for each kind.

    Where vision is blocked, a line for each who does not see it; and one where all
    vision tokens leave.
    """
    kinds = sorted({point.kind for point in points})
    figure, axes = plt.subplots(
        1,
        len(kinds),
        figsize=(1.5 + 3.3 * len(kinds), 3.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        for cut in dict.fromkeys(point.cut for point in points):
            mine = [p for p in points if (p.cut, p.kind) == (cut, kind)]
            layers = [p.layer for p in mine]
            value, low, high = (
                [100 * getattr(p, name) for p in mine]
                for name in ("value", "low", "high")
            )
            label = cut if cut == DROPPED else f"vision → {cut}, blocked"
            axis.plot(layers, value, marker="o", markersize=4, label=label)
            axis.fill_between(layers, low, high, alpha=0.2)
        _layer_axis(axis, layers, pattern)
        count = mine[0].count
        axis.set(title=f"{kind} ({count} questions)", ylim=(0, 101))
    axes[0, 0].set(ylabel="answered exactly, %")
    axes[0, -1].legend(fontsize="x-small")
    return figure


def _layer_axis(axis: Any, layers: Sequence[int], pattern: str) -> None:
    names = [*pattern, "none"]
    axis.set_xticks(layers, [f"{names[i]}\n{i}" for i in layers])
    axis.set(xlabel="cut from this layer on")
    axis.grid(alpha=0.3)


def shares(
    values: Mapping[str, Float[np.ndarray, " layers"]],
    layers: Sequence[int],
    pattern: str,
    title: str,
) -> Figure:
    """What tokens take of each region, by layer, as shares of the whole."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, value in values.items():
        axis.plot(layers, 100 * value, marker="o", markersize=4, label=name)
    _layer_axis(axis, layers, pattern)
    axis.set(title=title, xlabel="layer", ylabel="share, %", ylim=(0, 101))
    axis.legend(fontsize="small")
    return figure


def region_map(
    values: Float[np.ndarray, "Y X"],
    names: Sequence[str],
    groups: slice,
    num_frames: int,
    thumbnails: Thumbnails,
    title: str,
) -> Figure:
    """A map by regions: who takes (down) of what (across), frames with pictures."""
    figure, axis = plt.subplots(figsize=(5.8, 5.4), layout="constrained")
    limit = float(np.abs(values).max()) or 1.0
    signed = values.min() < 0
    count = groups.stop - groups.start
    in_text = np.array([not groups.start <= i < groups.stop for i in range(len(names))])
    # Regions of text are few, and drawn wide enough to be seen and named.
    edges = np.cumsum([0, *np.where(in_text, max(1, count / 16), 1)])
    image = axis.pcolormesh(
        *(edges, edges, values),
        cmap="RdBu_r" if signed else "magma",
        vmin=-limit if signed else 0,
        vmax=limit,
    )
    figure.colorbar(image, shrink=0.8)
    axis.invert_yaxis()
    middles = (edges[:-1] + edges[1:])[in_text] / 2
    text = [name for name, here in zip(names, in_text, strict=True) if here]
    axis.set_yticks(middles, text)
    axis.xaxis.tick_top()
    axis.set_xticks(middles, text, rotation=90)
    axis.set(title=title)
    for frame, picture in list(thumbnails.items())[::2]:
        place = edges[groups.start] + (frame + 0.5) * count / num_frames
        _picture(axis, picture, place)
    return figure


def frame_rows(
    rows: Float[np.ndarray, "Y F"],
    names: Sequence[str],
    thumbnails: Thumbnails,
    title: str,
    times: Float[np.ndarray, "F"],
) -> Figure:
    """A line of each name over the frames, as strong as it may be in that line.

    To the right stands when each line is strongest.
    """
    figure, axis = _over_frames(len(rows), title, times)
    # Magnitudes: a state may also be taken away from.
    strength = np.abs(rows)
    strength = strength / np.maximum(strength.max(axis=1, keepdims=True), 1e-30)
    # A picture has fewer columns than a long video frames; none may hide the strongest.
    shown = np.maximum.reduceat(strength, _columns(len(times)), axis=1)
    _draw(axis, shown, len(times), cmap="magma")
    axis.set_yticks(range(len(names)), names)
    right = axis.secondary_yaxis("right")
    strongest = times[strength.argmax(axis=1)]
    right.set_yticks(range(len(names)), [f"{time:.0f} s" for time in strongest])
    right.set_ylabel("strongest at", fontsize="small")
    for frame, picture in thumbnails.items():
        _picture(axis, picture, frame)
    return figure


def kept_tokens(
    kept: Sequence[Int[np.ndarray, "F"]],
    names: Sequence[str],
    tokens_per_frame: int,
    thumbnails: Thumbnails,
    times: Float[np.ndarray, "F"],
) -> Figure:
    """How many tokens of each frame are left behind each stage of TransV."""
    figure, axis = _over_frames(len(kept), "Vision tokens kept, by frame", times)
    columns = _columns(len(times))
    sums = np.add.reduceat(np.stack(kept), columns, axis=1)
    shown = sums / np.diff([*columns, len(times)])
    image = _draw(axis, shown, len(times), cmap="Greens", vmin=0, vmax=tokens_per_frame)
    figure.colorbar(image, label="tokens")
    axis.set_yticks(range(len(names)), names)
    for frame, picture in thumbnails.items():
        _picture(axis, picture, frame)
    return figure


def _over_frames(
    num_lines: int, title: str, times: Float[np.ndarray, "F"]
) -> tuple[Figure, Any]:
    """An axis of frames that tells their times above and has room for pictures."""
    figure, axis = plt.subplots(
        figsize=(11.5, 1.6 + 0.32 * num_lines), layout="constrained"
    )
    at = np.unique(np.linspace(0, len(times) - 1, 9).astype(int))
    axis.xaxis.tick_top()
    axis.set_xticks(at, [f"{times[i]:.0f} s" for i in at])
    axis.set(title=title)
    return figure, axis


def _columns(num_frames: int) -> Int[np.ndarray, " X"]:
    """The first frame of each column of a picture, which has at most so many."""
    count = min(num_frames, _COLUMNS)
    return np.arange(count) * num_frames // count


def _draw(
    axis: Any, values: Float[np.ndarray, "Y X"], num_frames: int, **colours: Any
) -> Any:
    """Lines over all frames, whatever the number of columns."""
    return axis.imshow(
        values,
        extent=(-0.5, num_frames - 0.5, len(values) - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
        **colours,
    )


def _picture(
    axis: Any, picture: UInt8[np.ndarray, "H W 3"], place: float | int
) -> None:
    """A thumbnail below the axis, at a place along it."""
    box = AnnotationBbox(
        OffsetImage(picture, zoom=40 / picture.shape[1]),
        (place, 0),
        xybox=(0, -24),
        xycoords=("data", "axes fraction"),
        boxcoords="offset points",
        frameon=False,
        annotation_clip=False,
    )
    axis.add_artist(box)
