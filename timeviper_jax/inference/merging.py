"""An encoder that is spared the frames of a video that repeat an earlier one."""

import numpy as np
from jaxtyping import Float16

from timeviper_jax.data.redundancy import Changes
from timeviper_jax.inference.encode import Encode, Frames


class Merging:
    """Encodes consecutive frames of one video: those that changed, for the others too.

    Takes the place of the `Encode` it is given. That one should fill its batches with
    less than a portion of frames, or it will pad what was spared.
    """

    def __init__(self, encode: Encode, threshold: float):
        self._encode, self._changed = encode, Changes(threshold)
        self._known: Float16[np.ndarray, "_ V E"] | None = None  # Of the last frame.
        self.seen = self.encoded = 0

    def __call__(self, frames: Frames) -> Float16[np.ndarray, "F V E"]:
        changed = self._changed(frames)
        known = [] if self._known is None else [self._known]
        if changed.any():
            known.append(self._encode(frames[changed]))
        # The first of what is known is older than this portion, if it is not the first.
        index = np.cumsum(changed) - (self._known is None)
        features = np.concatenate(known)[index]
        self._known = features[-1:]
        self.seen += len(frames)
        self.encoded += int(changed.sum())
        return features
