"""The published benchmarks by name, asked as the paper does.

Frames are taken at one a second, at least 32 and at most 256 of them, evenly.
"""

import collections
import dataclasses
import fnmatch
import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64

from timeviper_jax.data.conversation import Media, Turn
from timeviper_jax.data.items import Sampling
from timeviper_jax.data.video import VideoInfo, probe
from timeviper_jax.evals import captions, choices, grounding, subtitles
from timeviper_jax.evals.base import Question
from timeviper_jax.evals.entries import DataError, Entry, letter
from timeviper_jax.evals.families import (
    CAPTION,
    CHOICE,
    DENSE,
    GROUNDING,
    Family,
    Tools,
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A benchmark: its reader, its kind, and over what its headline is a mean.

    `mean_of` names the group whose values weigh the same; "" lets questions do.
    """

    read: Callable[[pathlib.Path], list[Entry]]
    family: Family
    mean_of: str = ""
    has_subtitles: bool = False


SPECS = {
    "videomme": Spec(choices.videomme, CHOICE, has_subtitles=True),
    "lvbench": Spec(choices.lvbench, CHOICE),
    "mlvu": Spec(choices.mlvu, CHOICE, mean_of="task"),
    "longvideobench": Spec(choices.longvideobench, CHOICE, has_subtitles=True),
    "egoschema": Spec(choices.egoschema, CHOICE),
    "mvbench": Spec(choices.mvbench, CHOICE, mean_of="task"),
    "tempcompass": Spec(choices.tempcompass, CHOICE),
    "cgbench": Spec(choices.cgbench, CHOICE, has_subtitles=True),
    "charades": Spec(grounding.charades, GROUNDING),
    "activitynet": Spec(grounding.activitynet, GROUNDING),
    "tvgbench": Spec(grounding.tvgbench, GROUNDING),
    "vdc": Spec(captions.vdc, CAPTION, mean_of="task"),
    "youcook2": Spec(captions.youcook2, DENSE),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedBenchmark:
    """A benchmark out of its folder, or some of its questions.

    `only` keeps those whose id or whose group ("task=counting") fits one of its
    patterns; `limit` draws so many of these by `seed`, 0 for all.
    """

    name: str
    data: str
    max_frames: int = 256
    min_frames: int = 32
    subtitles: bool = False
    only: tuple[str, ...] = ()
    limit: int = 0
    seed: int = 0
    skip_missing: bool = False  # Leave out questions whose video is not there.
    tools: Tools = Tools()

    def __post_init__(self):
        if self.name not in SPECS:
            raise ValueError(f"{self.name!r} is no benchmark; they are {[*SPECS]}.")
        if self.subtitles and not self.spec.has_subtitles:
            having = [name for name, spec in SPECS.items() if spec.has_subtitles]
            raise ValueError(f"{self.name} has no subtitles; {having} have.")

    @property
    def spec(self) -> Spec:
        return SPECS[self.name]

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """The questions chosen, as they are published."""
        entries = self.spec.read(pathlib.Path(self.data))
        counts = collections.Counter(entry.id for entry in entries)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise DataError(f"{self.data}: {len(twice)} ids come twice: {twice[:3]}.")
        return self._there(self._some(self._only(entries)))

    def _only(self, entries: list[Entry]) -> list[Entry]:
        if not self.only:
            return entries
        chosen = [entry for entry in entries if self._fits(entry)]
        if not chosen:
            known = sorted({group for entry in entries for group in entry.groups})
            raise ValueError(
                f"only={[*self.only]} fits none of {len(entries)} questions; groups are"
                f" {known[:20]}, ids {[entry.id for entry in entries[:3]]} and so on."
            )
        return chosen

    def _fits(self, entry: Entry) -> bool:
        names = (entry.id, *entry.groups)
        return any(
            fnmatch.fnmatchcase(name, pattern)
            for name in names
            for pattern in self.only
        )

    def _some(self, entries: list[Entry]) -> list[Entry]:
        if not 0 < self.limit < len(entries):
            return entries
        order = np.random.default_rng(self.seed).permutation(len(entries))
        return [entries[i] for i in np.sort(order[: self.limit])]

    def _there(self, entries: list[Entry]) -> list[Entry]:
        missing = {entry.video for entry in entries if not entry.video.exists()}
        if missing and not self.skip_missing:
            videos = {entry.video for entry in entries}
            raise DataError(
                f"{len(missing)} of {len(videos)} videos are missing, the first is"
                f" {min(missing)}; put them there, or leave them out with"
                " --skip_missing."
            )
        there = [entry for entry in entries if entry.video not in missing]
        if not there:
            raise DataError(f"{self.data}: none of {len(missing)} videos is there.")
        return there

    def questions(self) -> Sequence[Question]:
        info = functools.cache(probe)
        return [self._question(entry, info(entry.video)) for entry in self.entries]

    def score(self, question: Question, given: str) -> dict[str, float]:
        return self.spec.family.score(question.notes["entry"], given, self.tools)

    def _question(self, entry: Entry, info: VideoInfo) -> Question:
        start, end = _window(entry, info.duration / entry.frame_rate)
        times = self._times(start, end)
        family = self.spec.family
        seconds = entry.duration or end - start
        text = family.put(entry, len(times), seconds)
        if self.subtitles:
            text = f"{_said(entry, times)}\n{text}"
        return Question(
            id=entry.id,
            video=str(entry.video),
            times=times * entry.frame_rate,
            turns=(Turn("user", (Media(len(times)), text)),),
            answer=entry.answer,
            answer_prefix=family.prefix,
            choices=tuple(letter(i) for i in range(len(entry.options))),
            notes={"kind": self.name, "entry": entry},
        )

    def _times(self, start: float, end: float) -> Float64[np.ndarray, "F"]:
        sampling = Sampling(max_frames=self.max_frames, min_frames=self.min_frames)
        rng = np.random.default_rng(self.seed)
        return sampling.times(start, end, rng, capacity=self.max_frames)


def _window(entry: Entry, duration: float) -> tuple[float, float]:
    """The seconds to watch, cut to what the file has."""
    start, end = entry.window or (0.0, duration)
    end = min(end, duration)
    if not 0 <= start < end:
        raise DataError(
            f"{entry.id}: the window {entry.window} s does not lie in {entry.video},"
            f" which lasts {duration:g} s; copy the video again."
        )
    return start, end


def _said(entry: Entry, times: Float64[np.ndarray, "F"]) -> str:
    """The subtitles of the frames; a video without a file of them has none."""
    if entry.subtitles is None or not entry.subtitles.parent.is_dir():
        raise DataError(
            f"{entry.subtitles}: its folder of subtitles is not there; put it there, or"
            " leave out --subtitles."
        )
    said = []
    if entry.subtitles.exists():
        lines = subtitles.read(entry.subtitles)
        said = subtitles.on_screen(lines, times, start=entry.subtitle_start)
    return "Subtitles of the video:\n" + ("\n".join(said) or "(none)")
