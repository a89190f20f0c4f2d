"""What happens when in a needle video: scenes, and the showings inside them.

Nothing here touches a pixel, so a million scenes can be sampled to check that no
answer follows from a length, a position or a count.
"""

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Showing:
    """One photograph on the screen from `start` (inclusive) to `stop` (exclusive)."""

    name: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A stretch of one file that questions are about; all times are file seconds."""

    start: int
    length: int
    showings: tuple[Showing, ...]  # In order of time.

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def once(self) -> tuple[Showing, ...]:
        """The showings of the objects that are shown exactly once."""
        names = [showing.name for showing in self.showings]
        return tuple(s for s in self.showings if names.count(s.name) == 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """How scenes are drawn."""

    short_below: int = 128  # Scenes shorter than this have fewer needles.
    short_showings: tuple[int, int] = (1, 4)
    long_objects: tuple[int, int] = (3, 5)
    seconds: tuple[int, int] = (3, 8)  # A showing lasts this long, ends included.
    gap: int = 2  # At least this many seconds between two showings.
    repeat: float = 0.4  # Share of scenes that show one object two or three times.


def _inclusive(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def _draw_names(
    rng: np.random.Generator, length: int, names: tuple[str, ...], cfg: SceneConfig
) -> list[str]:
    """The objects of one scene, one entry a showing, in random order.

    A scene with a repeated object always holds a single one too, so "how many" can
    be asked of either and the mere presence of repeats does not answer it.
    """
    short = length < cfg.short_below
    times = _inclusive(rng, 2, 3) if rng.random() < cfg.repeat else 1
    if short:
        low, high = cfg.short_showings
        # Room for `times` showings of one object beside at least one single.
        objects = _inclusive(rng, max(low, min(times, 2)), high - times + 1)
    else:
        objects = _inclusive(rng, *cfg.long_objects)
    chosen = [str(name) for name in rng.choice(names, objects, replace=False)]
    showings = chosen + chosen[:1] * (times - 1)
    return [showings[i] for i in rng.permutation(len(showings))]


def place(
    rng: np.random.Generator, length: int, seconds: Int[np.ndarray, "S"], gap: int
) -> Int[np.ndarray, "S"]:
    """Start times, uniform over all placements in this order that keep the gap.

    Shrinking each showing and its gap to a point turns placements into subsets of
    the seconds that are left over, and subsets are drawn uniformly.
    """
    slack = length - int(seconds.sum()) - gap * (len(seconds) - 1)
    if slack < 0:
        raise ValueError(
            f"Showings of {seconds.tolist()} s, {gap} s apart, do not fit into "
            f"{length} s; use fewer, shorter ones or a longer scene."
        )
    points = np.sort(rng.choice(slack + len(seconds), len(seconds), replace=False))
    before = np.concatenate([[0], np.cumsum(seconds[:-1] + gap)])
    return points - np.arange(len(seconds)) + before


def draw_scene(
    rng: np.random.Generator,
    start: int,
    length: int,
    names: tuple[str, ...],
    cfg: SceneConfig,
) -> Scene:
    """One scene: which objects, how long each, and where."""
    shown = _draw_names(rng, length, names, cfg)
    low, high = cfg.seconds
    if len(shown) * (low + cfg.gap) - cfg.gap > length:
        raise ValueError(
            f"{len(shown)} showings of {low} s and more do not fit into {length} s; "
            "make the scenes longer."
        )
    while True:  # Durations are uniform among those that fit.
        seconds = rng.integers(low, high + 1, len(shown))
        if seconds.sum() + cfg.gap * (len(shown) - 1) <= length:
            break
    starts = start + place(rng, length, seconds, cfg.gap)
    return Scene(
        start=start,
        length=length,
        showings=tuple(
            Showing(name=name, start=int(at), stop=int(at + n))
            for name, at, n in zip(shown, starts, seconds, strict=True)
        ),
    )
