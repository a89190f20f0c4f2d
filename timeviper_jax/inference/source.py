"""The tokens of videos, cut into chunks of one size as they are read.

Features may come while they are read: from a file, or from an encoder that is still at
work. Each frame is asked for once, in order, and only when its chunk is.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from timeviper_jax.data.examples import Example, Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Consecutive tokens of right-padded rows; text has no features and time 0."""

    tokens: Int[np.ndarray, "B T"]
    roles: Int[np.ndarray, "B T"]
    features: Float[np.ndarray, "B T E"]
    times: Float[np.ndarray, "B T"]  # Seconds.

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def map(self, f: Callable[[np.ndarray], np.ndarray]) -> "Tokens":
        """With `f` of each of its arrays."""
        return Tokens(**{name: f(array) for name, array in vars(self).items()})

    def take(self, rows: Sequence[int]) -> "Tokens":
        return self.map(lambda array: array[list(rows)])

    def then(self, more: "Tokens") -> "Tokens":
        """These tokens and, in the same rows, others after them."""
        return Tokens(
            **{
                name: np.concatenate([array, getattr(more, name)], axis=1)
                for name, array in vars(self).items()
            }
        )

    def padded(self, length: int) -> "Tokens":
        return self.map(lambda array: pad(array, length))


def check_features(video: Example, feature_dim: int) -> None:
    """Raises where a prompt, its frames and a model's width do not fit together."""
    vision_tokens = np.count_nonzero(video.roles == Role.VISION)
    if not vision_tokens:
        return
    F, V, E = video.features.shape
    times = len(video.frame_times)
    if (F * V, F, E) != (vision_tokens, times, feature_dim):
        raise ValueError(
            f"Features of {F} frames of {V} tokens of width {E}, but the prompt has"
            f" {vision_tokens} vision tokens, there are {times} frame times, and the"
            f" model reads width {feature_dim}; encode the video with this model, at"
            " these times."
        )


def token_chunks(
    videos: Sequence[Example], *, rows: int, size: int, feature_dim: int
) -> Iterator[Tokens]:
    """Examples, one a row, `size` tokens at a time; rows without one are padding."""
    readers = [VisionReader(video) for video in videos]
    length = max((len(video.tokens) for video in videos), default=0)
    for start in range(0, length, size):
        tokens, roles = np.zeros((2, rows, size), np.int32)
        features = np.zeros((rows, size, feature_dim), np.float32)
        times = np.zeros((rows, size), np.float32)
        for row, (video, reader) in enumerate(zip(videos, readers, strict=True)):
            here = video.roles[start : start + size]
            roles[row, : len(here)] = here
            tokens[row, : len(here)] = video.tokens[start : start + size]
            at = np.flatnonzero(here == Role.VISION)
            if len(at):
                features[row, at], times[row, at] = reader.read(len(at))
        yield Tokens(tokens=tokens, roles=roles, features=features, times=times)


class VisionReader:
    """Reads the vision tokens of a video in order, and each frame once."""

    def __init__(self, video: Example):
        self._video, self._next = video, 0
        self._features = np.zeros((0, 0), np.float32)
        self._times = np.zeros(0, np.float32)

    def read(
        self, count: int
    ) -> tuple[Float[np.ndarray, "C E"], Float[np.ndarray, "C"]]:
        """The next `count` tokens and the seconds at which they are seen."""
        missing = count - len(self._times)
        if missing > 0:
            V = self._video.features.shape[1]
            self._take_frames(-(-missing // V))
        features, self._features = np.split(self._features, [count])
        times, self._times = np.split(self._times, [count])
        return features, times

    def _take_frames(self, frames: int) -> None:
        here = slice(self._next, self._next + frames)
        new = np.asarray(self._video.features[here])
        times = np.repeat(self._video.frame_times[here], new.shape[1])
        new = new.reshape(-1, new.shape[2])
        self._features = np.concatenate([self._features.reshape(-1, new.shape[1]), new])
        self._times = np.concatenate([self._times, times])
        self._next = here.stop


def pad(values: Shaped[np.ndarray, "B T *rest"], length: int) -> np.ndarray:
    """Zeros after the last token, up to `length`."""
    missing = length - values.shape[1]
    if not missing:
        return values
    return np.pad(values, [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2))
