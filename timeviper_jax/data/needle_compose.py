"""Long videos put together from encoded seconds: haystack, and one needle in it.

The encoder sees each frame alone, so the features of a video that was never rendered
are those of the seconds it is made of. A needle is a whole showing of a held-out file,
with its photograph's crop, light and place; the haystack is stretches of held-out
files in which nothing is shown, none of them used twice in a video. Times are those of
the new video.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float16

from timeviper_jax.data import needle_questions as questions
from timeviper_jax.data import needles
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.needle_questions import Question
from timeviper_jax.data.needle_scenes import Scene, Showing
from timeviper_jax.data.needle_sources import NAMES

LONGEST_PIECE = 32  # Seconds of haystack that stay together.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Seconds `start` to `stop` of a file."""

    video: str
    start: int
    stop: int

    @property
    def seconds(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composed:
    """A video as the pieces that follow each other in it, and what it shows when."""

    name: str  # The same at every depth.
    pieces: tuple[Piece, ...]
    showing: Showing
    depth: float  # How much of the haystack comes before the needle, 0 to 1.

    @property
    def seconds(self) -> int:
        return sum(piece.seconds for piece in self.pieces)

    @property
    def scene(self) -> Scene:
        return Scene(start=0, length=self.seconds, showings=(self.showing,))

    def features(self, store: FeatureStore) -> Float16[np.ndarray, "F V E"]:
        """The features of its seconds, one after the other."""
        return np.concatenate(
            [store.get(piece.video)[piece.start : piece.stop] for piece in self.pieces]
        )

    def ask(self, rng: np.random.Generator, kinds: Sequence[str]) -> list[Question]:
        """A question of each kind about the needle."""
        asked = [questions.ask_one(rng, self.scene, kind, NAMES) for kind in kinds]
        if missing := [k for k, q in zip(kinds, asked, strict=True) if q is None]:
            raise ValueError(
                f"A single needle has no questions of kinds {missing}; ask for some of"
                " mcq, what, when."
            )
        return asked


class Moments:
    """The showings and the empty stretches of a split of the needle data."""

    def __init__(self, data: pathlib.Path, split: str):
        self.showings: dict[str, list[Piece]] = {name: [] for name in NAMES}
        self.empty: list[Piece] = []
        for scene in needles.read_lines(data / f"{split}.scenes.jsonl"):
            video, at = str(data / scene["image"]), scene["video_start"]
            for name, start, stop in scene["objects"]:
                showing = Piece(video=video, start=start, stop=stop)
                self.showings[name].append(showing)
                self.empty += _cut(video, at, start)
                at = stop
            self.empty += _cut(video, at, scene["video_end"])

    @property
    def videos(self) -> list[str]:
        """The files that composing reads."""
        pieces = [*self.empty, *(p for some in self.showings.values() for p in some)]
        return sorted({piece.video for piece in pieces})

    def compose(self, seed: int, number: int, seconds: int, depth: float) -> Composed:
        """Video `number` of a length; at every depth its needle and haystack are one.

        So cells that differ in depth alone differ in nothing else.
        """
        rng = np.random.default_rng([seed, seconds, number])
        name = str(rng.choice([name for name in NAMES if self.showings[name]]))
        needle = self.showings[name][rng.integers(len(self.showings[name]))]
        around = self._haystack(rng, seconds - needle.seconds)
        start = round(depth * (seconds - needle.seconds))
        before, after = _split(around, start)
        return Composed(
            name=f"{seconds}/{number}",
            pieces=(*before, needle, *after),
            showing=Showing(name=name, start=start, stop=start + needle.seconds),
            depth=depth,
        )

    def _haystack(self, rng: np.random.Generator, seconds: int) -> list[Piece]:
        """Empty pieces in random order, `seconds` in all."""
        chosen, wanted = [], seconds
        for i in rng.permutation(len(self.empty)):
            if wanted <= 0:
                break
            piece = self.empty[i]
            stop = min(piece.stop, piece.start + wanted)
            chosen.append(dataclasses.replace(piece, stop=stop))
            wanted -= stop - piece.start
        if wanted:
            most = seconds - wanted
            raise ValueError(
                f"There are {most} seconds of haystack and {seconds} are wanted; ask"
                " for shorter videos, or make the data with a larger --scale."
            )
        return chosen


def _cut(video: str, start: int, stop: int) -> list[Piece]:
    return [
        Piece(video=video, start=at, stop=min(at + LONGEST_PIECE, stop))
        for at in range(start, stop, LONGEST_PIECE)
    ]


def _split(pieces: Sequence[Piece], at: int) -> tuple[list[Piece], list[Piece]]:
    """The pieces before and after second `at`; one that it lies in is cut there."""
    before: list[Piece] = []
    after: list[Piece] = []
    for piece in pieces:
        cut = min(max(piece.start + at, piece.start), piece.stop)
        parts = (
            dataclasses.replace(piece, stop=cut),
            dataclasses.replace(piece, start=cut),
        )
        for side, part in zip((before, after), parts, strict=True):
            side += [part] if part.seconds else []
        at -= piece.seconds
    return before, after
