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


def draw(
    rng: np.random.Generator,
    scenes: Sequence[Scene],
    names: tuple[str, ...],
    image: str,
) -> dict[str, Any] | None:
    """One item about a reel of these scenes; None if the draw cannot be asked about."""
    length = scenes[-1].stop
    showings = _draw_showings(rng, scenes, int(rng.integers(1, 3)))
    kind = str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
    whole = Scene(start=0, length=length, showings=showings)
    asked = questions.ask_one(rng, whole, kind, names)
    if asked is None or any(showing.stop >= length for showing in showings):
        return None
    item = questions.item(whole, asked, image)
    del item["video_start"], item["video_end"]
    times = _times(rng, scenes, showings)
    item["frame_times"] = [second + 0.5 for second in times]
    item["needle"] |= {"frames": FRAMES, "split": "train"}
    return item


def _draw_showings(
    rng: np.random.Generator, scenes: Sequence[Scene], count: int
) -> tuple[Showing, ...]:
    """Showings from different scenes, in order of time."""
    chosen = rng.choice(len(scenes), min(count, len(scenes)), replace=False)
    showings = [scenes[i].showings for i in sorted(chosen) if scenes[i].showings]
    return tuple(some[rng.integers(len(some))] for some in showings)


def _times(
    rng: np.random.Generator, scenes: Sequence[Scene], showings: Sequence[Showing]
) -> list[int]:
    """The seconds that are looked at: around the needles, and where nothing is."""
    times = {t for s in showings for t in (s.start, s.stop - 1, s.stop)}
    shown = {
        second
        for scene in scenes
        for showing in scene.showings
        for second in range(showing.start, showing.stop)
    }
    empty = np.setdiff1d(np.arange(scenes[-1].stop), list(shown | times))
    more = rng.choice(empty, FRAMES - len(times), replace=False)
    return sorted({*times, *map(int, more)})
