"""Frames that show what was just seen, found before an encoder spends time on them.

    changed = Changes(threshold=0.05)
    changed(frames)  # True where a frame is worth encoding.
    changed(more)  # The frames after them: those of a video may come in any portions.

Repeats may be *merged*, when their features are those of the frame they repeat
(`inference/merging.py`), or *skipped*: a video is then watched at `changed_times` only.

A frame has changed when some part of it differs from the last frame that *had changed*
by the threshold or more. EVS (arXiv 2510.14624) compares with the frame before, so that
what changes slowly never changes, and drops the share of patches that changed least,
whatever the video. It does so behind the encoder, which saves none of its time. The
unit here is a frame, because the encoder attends and merges tokens within each: without
some patches it would have to encode the others all the same, to other tokens.
"""

import os
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float64, UInt8

from timeviper_jax.data.images import Fit
from timeviper_jax.data.video import iter_frames

Frame = UInt8[np.ndarray, "H W 3"]
GRID = 4  # Parts a side: something small that moves is much of its own part.


class Changes:
    """Says of the frames of one video, portion by portion, which of them changed.

    The first always has; with threshold 0 every frame has. One frame is held.
    """

    def __init__(self, threshold: float):
        if not 0 <= threshold <= 1:
            raise ValueError(
                f"{threshold=} is not a share of black to white; give 0 to 1."
            )
        self._threshold = threshold
        self._last: Frame | None = None

    def __call__(self, frames: Iterable[Frame]) -> Bool[np.ndarray, "F"]:
        return np.array([self._changed(frame) for frame in frames], bool)

    def _changed(self, frame: Frame) -> bool:
        if self._last is not None and difference(frame, self._last) < self._threshold:
            return False
        self._last = frame
        return True


def difference(one: Frame, other: Frame) -> float:
    """How much the part that differs most differs, as a share of black to white."""
    levels = np.abs(one.astype(np.int16) - other).mean(axis=2)
    rows, columns = (
        np.linspace(0, size, min(GRID, size), endpoint=False).astype(int)
        for size in levels.shape
    )
    sums = np.add.reduceat(np.add.reduceat(levels, rows, axis=0), columns, axis=1)
    heights = np.diff(np.append(rows, levels.shape[0]))
    widths = np.diff(np.append(columns, levels.shape[1]))
    return float((sums / (heights[:, None] * widths)).max() / 255)


def changed_times(
    path: str | os.PathLike,
    times: Float64[np.ndarray, "F"],
    fit: Fit,
    threshold: float,
) -> Float64[np.ndarray, " _"]:
    """Those of `times` at which a video shows something else than before.

    It is decoded for that, a frame at a time, and not kept.
    """
    return times[Changes(threshold)(iter_frames(path, times, fit))]
