"""Glimpses: questions about a few moments of a training reel, far apart in time.

A needle is seen three times: as it appears, in its last second, and in the second
after. Around it stand moments in which nothing is shown. Since all of them are far
apart, every digit of an answer says whether the right frame was looked at, which
teaches a model where to look before it watches whole scenes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from timeviper_jax.data import needle_questions as questions
from timeviper_jax.data.needle_scenes import Scene, Showing

FRAMES = 8
# How often each kind is asked; "how many" needs whole scenes.
_KINDS = {"when": 0.5, "mcq": 0.3, "what": 0.1, "first": 0.1}


class Reel:
    """A file of many scenes, and when it shows something."""

    def __init__(self, scenes: Sequence[Scene], image: str):
        self.image, self.length = image, scenes[-1].stop
        self.scenes = [scene for scene in scenes if scene.showings]
        self.shows = np.zeros(self.length + 1, bool)
        for scene in self.scenes:
            for showing in scene.showings:
                self.shows[showing.start : showing.stop] = True
        # There is no second after the last one: nobody can see a needle end there.
        self.shows[self.length] = True
        self.empty = np.flatnonzero(~self.shows)


def draw(
    rng: np.random.Generator, reel: Reel, names: tuple[str, ...]
) -> dict[str, Any] | None:
    """One item about a reel; None if what was drawn cannot be asked about."""
    showings = _draw_showings(rng, reel, int(rng.integers(1, 3)))
    if any(reel.shows[showing.stop] for showing in showings):
        return None
    kind = str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
    whole = Scene(start=0, length=reel.length, showings=showings)
    asked = questions.ask_one(rng, whole, kind, names)
    if asked is None:
        return None
    item = questions.item(whole, asked, reel.image)
    del item["video_start"], item["video_end"]
    item["frame_times"] = [t + 0.5 for t in _times(rng, reel, showings)]
    item["needle"] |= {"frames": FRAMES, "split": "train"}
    return item


def _draw_showings(
    rng: np.random.Generator, reel: Reel, count: int
) -> tuple[Showing, ...]:
    """Showings from different scenes, in order of time."""
    count = min(count, len(reel.scenes))
    chosen = sorted(rng.choice(len(reel.scenes), count, replace=False))
    showings = [reel.scenes[i].showings for i in chosen]
    return tuple(some[rng.integers(len(some))] for some in showings)


def _times(
    rng: np.random.Generator, reel: Reel, showings: Sequence[Showing]
) -> list[int]:
    """The seconds that are looked at: around the needles, and where nothing is."""
    times = {t for s in showings for t in (s.start, s.stop - 1, s.stop)}
    while len(times) < FRAMES:
        times.add(int(rng.choice(reel.empty)))
    return sorted(times)
