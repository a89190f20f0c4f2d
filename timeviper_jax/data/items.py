"""What a manifest describes: data sets, items, and the turns that one makes."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from timeviper_jax.data.conversation import Media, Turn
from timeviper_jax.data.video import Number, fps_times, sample_times

TIME_PROMPT = (
    "The video lasts for {} seconds, and {} frames are uniformly sampled from it."
)
GROUNDING_PROMPT = (
    "When does this happen in the video: '{}'? Answer with the start and the end in"
    " seconds, as 'start to end'."
)
CAPTION_PROMPTS = (
    "Describe the {}.",
    "What does the {} show?",
    "Say what can be seen in the {}.",
    "Give a caption for the {}.",
)
# A newline beside a marker belongs to it: media and text have no separator.
MARKER = re.compile(r"\n?<image>\n?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which moments of a video become frames."""

    kind: str = "fps"  # Or frames in the `middle` of spans, or anywhere (`rand`).
    fps: Number = 1
    num_frames: int | None = None  # None: one for each 1 / fps seconds.
    max_frames: int = 256
    min_frames: int = 1

    def times(
        self,
        start: Number,
        end: Number,
        rng: np.random.Generator,
        *,
        capacity: int,
    ) -> np.ndarray:
        """Ascending seconds between `start` and `end`, at most `capacity` of them."""
        if self.num_frames is not None:
            times = sample_times(end, self.num_frames, start=start)
        else:
            most = min(self.max_frames, capacity)
            least = min(self.min_frames, most)
            times = fps_times(end, self.fps, most, least, start=start)
        if self.kind == "rand":
            times = times + rng.uniform(-0.5, 0.5, len(times)) * (
                (end - start) / len(times)
            )
        return times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One entry of a manifest."""

    name: str
    format: str
    json_path: str
    data_path: str = "."
    split: str = "train"
    dataset_type: str = "video"  # Or image; names the medium in caption prompts.
    pack_size: int = 1  # Items that may share a row; the format says `_packed`.
    max_size: int | None = None  # Use at most this many items.
    sample_ratio: Number = 1  # Share of the items used; over 1 repeats them.
    max_txt_seq_len: int | None = None  # Items with more text tokens are skipped.
    use_template: bool = True  # For tvg: wrap the query in a question.
    video_sample_type: str = "fps1"
    video_num_frames: int | str = "auto"
    max_num_frames_fps: int = 256
    min_num_frames_fps: int = 1

    @property
    def kind(self) -> str:
        return self.format.removesuffix("_packed")

    @property
    def sampling(self) -> Sampling:
        kind, fps = self.video_sample_type, 1
        if kind.startswith("fps"):
            kind, fps = "fps", float(kind.removeprefix("fps"))
        fixed = self.video_num_frames != "auto"
        return Sampling(
            kind=kind,
            fps=fps,
            num_frames=self.video_num_frames if fixed else None,
            max_frames=self.max_num_frames_fps,
            min_frames=self.min_num_frames_fps,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One sample as it stands in a manifest, its media still files."""

    id: str
    dataset: Dataset
    media: tuple[str, ...]  # Paths.
    conversation: tuple[tuple[str, str], ...]  # Speaker and text with markers.
    duration: Number | None = None
    start: Number | None = None
    end: Number | None = None
    frame_times: tuple[Number, ...] | None = None
    notes: Mapping[str, Any] | None = None  # What evaluation wants to know.

    def turns(
        self, num_frames: Sequence[int], seconds: Number, rng: np.random.Generator
    ) -> list[Turn]:
        """The conversation, once each medium's frames and the length are known."""
        kind = self.dataset.kind
        if kind == "caption":
            prompt = CAPTION_PROMPTS[rng.integers(len(CAPTION_PROMPTS))]
            question = prompt.format(self.dataset.dataset_type)
            return [
                Turn("user", (*map(Media, num_frames), question)),
                Turn("assistant", (self.conversation[0][1],)),
            ]
        turns = _place_media(self.conversation, num_frames)
        if kind in ("tvg", "dvc"):
            lasts = round(self.duration or seconds, 2)
            times = TIME_PROMPT.format(f"{lasts:.12g}", sum(num_frames))
            turns = list(self._with_times(turns, times))
        return turns

    def _with_times(self, turns: Sequence[Turn], times: str) -> Iterator[Turn]:
        """Says how long the video is, after the media of the first question."""
        said = False
        for turn in turns:
            if turn.speaker != "user" or said:
                yield turn
                continue
            said = True
            media = tuple(part for part in turn.content if isinstance(part, Media))
            text = "".join(part for part in turn.content if isinstance(part, str))
            if self.dataset.kind == "tvg" and self.dataset.use_template:
                text = GROUNDING_PROMPT.format(text)
            yield Turn("user", (*media, f"{times} {text}"))


def _place_media(
    conversation: Sequence[tuple[str, str]], num_frames: Sequence[int]
) -> list[Turn]:
    """Puts media in the places of their markers, or before the first question."""
    markers = sum(len(MARKER.findall(text)) for _, text in conversation)
    if markers == len(num_frames):
        waiting = [(Media(count),) for count in num_frames]
    else:
        waiting = [tuple(map(Media, num_frames))]
    turns = []
    for speaker, text in conversation:
        first, *others = MARKER.split(text)
        content: tuple[str | Media, ...] = (first,)
        if speaker == "user" and not markers:
            content, waiting = (*sum(waiting, ()), first), []
        for other in others:
            content += (*waiting.pop(0), other)
        turns.append(Turn(speaker, tuple(part for part in content if part != "")))
    return turns
