"""Frames that show what was just seen, found before an encoder spends time on them.

    changes = Changes(frames, threshold=0.05)
    features = encode(changes)  # Only of the frames that changed.
    features = features[changes.sources]  # Merged: a frame for each that was seen.
    times = times[changes.kept]  # Or skipped: the frames that changed, at their times.

A frame has changed when some part of it differs from the last frame that was *passed
on* by `threshold` or more. EVS (arXiv 2510.14624) compares with the frame before, so a
scene that changes slowly never changes; it drops a fixed share of each video's patches,
where this drops what a threshold says, nothing of a video that never rests. The unit is
a frame because the tokens of a frame are merged inside the encoder: without some of its
patches a frame would have to be encoded all the same, and merged to other tokens.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Int, UInt8

Frame = UInt8[np.ndarray, "H W 3"]
GRID = 4  # Parts a side: something small that moves is much of its own part.


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


class Changes:
    """Passes on the frames of one video that changed, and remembers which they are.

    The first always has; with threshold 0 every frame has. Frames are looked at as they
    are asked for, and one is held, so a video may be of any length.
    """

    def __init__(self, frames: Iterable[Frame], threshold: float):
        if not 0 <= threshold <= 1:
            raise ValueError(
                f"{threshold=} is not a share of black to white; give 0 to 1."
            )
        self._frames, self._threshold = frames, threshold
        self._sources: list[int] = []
        self._passed = 0

    def __iter__(self) -> Iterator[Frame]:
        last = None
        for frame in self._frames:
            changed = last is None or difference(frame, last) >= self._threshold
            self._passed += changed
            self._sources.append(self._passed - 1)
            if changed:
                last = frame
                yield frame

    @property
    def sources(self) -> Int[np.ndarray, "F"]:
        """For each frame seen so far, which of those passed on it repeats."""
        return np.array(self._sources, np.int64)

    @property
    def kept(self) -> Bool[np.ndarray, "F"]:
        """For each frame seen so far, whether it was passed on."""
        return np.diff(self.sources, prepend=-1) > 0
