"""Decoding one video stream forwards, and holding it against what its file declares.

The frame of a time is the last that starts at or before it. What a file says of its
length, its frames and their order is believed only as far as its frames bear it out.
"""

import fractions
import math
import pathlib
from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float64, UInt8

from timeviper_jax.data.images import Fit
from timeviper_jax.data.media import MediaLimits, VideoError

# Where no index tells where the key frames are, they are taken to be this far apart.
_GOP_SECONDS = 10.0
# A seek costs about as much as decoding this many frames.
_SEEK_FRAMES = 8
# Containers that do not count their frames also round their duration.
_LOOSE_END_SECONDS = 1.0
# A frame that only repeats the last one, and its entry in the index.
_LEAST_BYTES = 8
_NO_TIMESTAMPS = (
    "zero frames, or none with a timestamp; write it again as an mp4"
    " (ffmpeg -i FILE out.mp4)."
)


def duration_of(
    container: av.container.InputContainer, stream: av.VideoStream, path: pathlib.Path
) -> float:
    """The seconds of the video, by its stream, its container, or its packets."""
    claims = []
    if stream.duration:
        claims.append(float(stream.duration * stream.time_base))
    if container.duration:
        claims.append(container.duration / av.time_base)
    if not claims:
        claims.append(_scan_duration(container, stream))
    # The container's is longer where the sound is, and shorter where an edit cuts.
    if min(claims) <= 0:
        raise VideoError(f"{path}: {_NO_TIMESTAMPS}")
    return min(claims)


def _scan_duration(
    container: av.container.InputContainer, stream: av.VideoStream
) -> float:
    """The end of the last packet; for live recordings, which declare no duration."""
    start, end = None, 0
    for packet in container.demux(stream):
        if packet.pts is not None:
            start = packet.pts if start is None else min(start, packet.pts)
            end = max(end, packet.pts + (packet.duration or 0))
    if start is None:
        return 0.0
    container.seek(0)
    return float((end - start) * stream.time_base)


class VideoReader:
    """Decodes one stream forwards, frame by frame, seeking where it pays."""

    def __init__(
        self,
        container: av.container.InputContainer,
        stream: av.VideoStream,
        path: pathlib.Path,
    ):
        self._container, self._stream, self._path = container, stream, path
        self._duration = duration_of(container, stream, path)
        self._origin = stream.start_time or 0
        rate = stream.average_rate or stream.base_rate or fractions.Fraction(1)
        self._frame_ticks = max(1, round(1 / (rate * stream.time_base)))
        # AVI has no timestamps of its own: its frames are numbered, never sought.
        self._numbered = container.format.name == "avi"
        self._has_index = 0 < stream.frames <= len(stream.index_entries)
        self._converter = VideoReformatter()
        self._quarter_turns: int | None = None  # Phones film sideways and say so.
        # Since the last seek: frames, the start of the last one, and the longest time
        # from one to the next.
        self._decoded, self._longest = 0, 0
        self._last: int | None = None

    def check_extent(self, limits: MediaLimits) -> None:
        """Raises if the video is said to be longer than it may be, or than it can."""
        limits.check_extent(
            self._path,
            frames=self._num_frames(),
            seconds=self._duration,
            fps=float(self._stream.average_rate or 0),
        )
        count, size = self._stream.frames, self._path.stat().st_size
        if count * _LEAST_BYTES > size:
            raise VideoError(
                f"{self._path}: {count} frames cannot be in {size} bytes; the file is"
                " damaged: copy it again."
            )
        if count > 1 and self._frame_ticks > self._ticks(self._duration):
            raise VideoError(
                f"{self._path}: {count} frames in {self._duration:g} s, each of"
                f" {float(self._frame_ticks * self._stream.time_base):g} s; the file is"
                " damaged: copy it again."
            )

    def frames(
        self, times: Float64[np.ndarray, "F"], fit: Fit
    ) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
        """Yields the frame on screen at each time."""
        self._check_length()
        stamps = self._decode()
        shown, converted = None, None
        coming: tuple[int, av.VideoFrame] | None = next(stamps, None)
        self._check_start(coming)
        for target in self._targets(times):
            if coming is not None and self._seek_pays(coming[0], target):
                stamps, coming = self._seek(target)
                shown, converted = None, None
            while coming is not None and coming[0] <= target:
                shown, converted = coming[1], None
                coming = next(stamps, None)
            if converted is None:
                # Before the first frame there is nothing to show but the first frame.
                converted = self._convert(shown or coming[1], fit)
            yield converted

    def _targets(self, times: Float64[np.ndarray, "F"]) -> list[int]:
        """Times in the stream's own unit."""
        if len(times) and not 0 <= times[0] <= times[-1] <= self._duration + 1e-3:
            raise VideoError(
                f"{self._path}: lasts {self._duration:g} s, but frames were asked for"
                f" from {times[0]:g} to {times[-1]:g} s; ask within it."
            )
        # A time that is a frame's start up to rounding means that frame.
        ticks = np.floor(times / float(self._stream.time_base) + 1e-6)
        return (ticks.astype(np.int64) + self._origin).tolist()

    def _decode(self, from_start: bool = True) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames from here on, each with the tick at which it appears.

        From the start there must be some; further on the last key frame may be past.
        """
        end = None
        for frames, is_last in self._decode_packets():
            stamps = [self._stamp(frame, i) for i, frame in enumerate(frames)]
            self._decoded += len(frames)
            for stamp in stamps:
                self._check_order(stamp)
            if frames:
                end = stamps[-1] + (frames[-1].duration or self._frame_ticks)
            if is_last and (from_start or end is not None):
                self._check_end(end)
            if is_last and from_start:
                self._check_count()
            yield from zip(stamps, frames, strict=True)

    def _decode_packets(self) -> Iterator[tuple[list[av.VideoFrame], bool]]:
        """The frames that each packet completes, and whether it is the last."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    raise self._cut_short(self._decoded)
                # The empty packet at the end brings out what the decoder held back.
                yield packet.decode(), packet.dts is None and packet.size == 0
        except av.error.InvalidDataError as error:
            raise self._cut_short(self._decoded) from error

    def _stamp(self, frame: av.VideoFrame, index: int) -> int:
        """The tick at which a frame appears, `index` frames after those decoded."""
        if self._numbered:
            return self._origin + (self._decoded + index) * self._frame_ticks
        if frame.pts is None:
            raise VideoError(f"{self._path}: {_NO_TIMESTAMPS}")
        return frame.pts

    def _seek_pays(self, here: int, target: int) -> bool:
        """Whether a key frame lies so far on from `here` that seeking saves work."""
        worth = _SEEK_FRAMES * self._frame_ticks
        if target - here <= worth or self._numbered:
            return False
        if self._has_index:
            entries = self._stream.index_entries
            key = entries[entries.search_timestamp(target)].timestamp
            return key - here > worth
        return target - here > self._ticks(_GOP_SECONDS)

    def _seek(
        self, target: int
    ) -> tuple[Iterator[tuple[int, av.VideoFrame]], tuple[int, av.VideoFrame] | None]:
        """Decodes from the last key frame that is on screen by `target`."""
        key, step = target, _SEEK_FRAMES * self._frame_ticks
        while True:
            from_start = key <= self._origin
            self._container.seek(max(key, self._origin), stream=self._stream)
            self._decoded, self._last, self._longest = 0, None, 0
            stamps = self._decode(from_start)
            # Frames before the key frame may lean on others that were not decoded.
            coming = next((s for s in stamps if from_start or s[1].key_frame), None)
            if (coming and coming[0] <= target) or from_start:
                return stamps, coming
            # Where an index holds decoding times, its key frame may be shown later;
            # where there is none, a seek may lead beyond the last key frame.
            key, step = key - step, 2 * step

    def _convert(self, frame: av.VideoFrame, fit: Fit) -> np.ndarray:
        if self._quarter_turns is None:
            self._quarter_turns = round(frame.rotation / 90)
        # One converter for all frames, in this thread: 10 times faster than to_image.
        rgb = self._converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        if self._quarter_turns:
            rgb = np.ascontiguousarray(np.rot90(rgb, self._quarter_turns))
        return fit(rgb)

    def _check_length(self) -> None:
        """Raises if the index lists frames that lie beyond the end of the file."""
        size = self._path.stat().st_size
        entries = self._stream.index_entries
        if self._has_index and entries[-1].pos + entries[-1].size > size:
            raise self._cut_short(sum(e.pos + e.size <= size for e in entries))

    def _check_start(self, first: tuple[int, av.VideoFrame] | None) -> None:
        """Raises if too much is missing before the first frame that is whole."""
        gap = first[0] - self._origin if first else 0
        if gap > self._ticks(_LOOSE_END_SECONDS):
            missing = gap // self._frame_ticks
            raise self._cut_short(max(0, self._num_frames() - missing))

    def _check_order(self, stamp: int) -> None:
        """Raises if a frame appears before the one that was shown before it."""
        last = stamp if self._last is None else self._last
        if stamp < last:
            seconds = float((stamp - self._origin) * self._stream.time_base)
            raise VideoError(
                f"{self._path}: a frame of {seconds:g} s comes after later ones; the"
                " file is damaged: copy it again."
            )
        self._longest = max(self._longest, stamp - last)
        self._last = stamp

    def _check_count(self) -> None:
        """Raises if all were decoded and there is a hole where frames should be.

        Counted only where the container counts none: frames may then last any time.
        Neither sign is enough: a rate may be guessed wrongly, a screen may stand still.
        """
        loose = self._ticks(_LOOSE_END_SECONDS)
        missing = self._num_frames() - self._decoded
        hole = self._longest > loose and missing * self._frame_ticks > loose
        if hole and not self._stream.frames:
            why = (
                "is damaged, or its frames last differently long: copy it again, or"
                " write it as an mp4 (ffmpeg -i FILE out.mp4)"
            )
            raise self._cut_short(self._decoded, why)

    def _check_end(self, end: int | None) -> None:
        """Raises if the stream ends before it was said to.

        The count alone would accuse sound files: one cut out of another without
        encoding it anew may begin with frames that cannot be decoded.
        """
        if end is None:
            raise self._cut_short(0)
        gap = self._origin + self._ticks(self._duration) - end
        slack = self._frame_ticks // 2
        if not self._stream.frames:
            slack = self._ticks(_LOOSE_END_SECONDS)
        if gap > slack:
            missing = math.ceil(gap / self._frame_ticks)
            raise self._cut_short(max(0, self._num_frames() - missing))

    def _num_frames(self) -> int:
        return self._stream.frames or self._ticks(self._duration) // self._frame_ticks

    def _ticks(self, seconds: float) -> int:
        return round(seconds / self._stream.time_base)

    def _cut_short(
        self, decoded: int, why: str = "is cut short or damaged: copy it again"
    ) -> VideoError:
        return VideoError(
            f"{self._path}: only {decoded} of {self._num_frames()} frames can be"
            f" decoded; the file {why}."
        )
