"""Frames of a video at given seconds: exact, fast, and honest about bad files.

The frame of a time is the one on screen then: the last that starts at or before it.
An image is a video of one second; a folder of images is a video at one frame a second.
Files that cannot give what was asked raise `VideoError`, never a wrong frame.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import av
import numpy as np
from jaxtyping import Float64, UInt8

from timeviper_jax.data.images import Fit, as_fit
from timeviper_jax.data.media import (
    MediaLimits,
    Number,
    VideoError,
    image_files,
    image_size,
    open_video,
    read_image,
)
from timeviper_jax.data.video_reader import VideoReader, duration_of

LIMITS = MediaLimits()


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a media file says of itself."""

    duration: float  # Seconds.
    num_frames: int  # Declared, or else duration times fps.
    fps: float
    height: int  # As stored; a reader may have to turn it upright.
    width: int


def probe(path: str | pathlib.Path, limits: MediaLimits = LIMITS) -> VideoInfo:
    """Reads duration and sizes without decoding a video's frames."""
    path = pathlib.Path(path)
    if images := image_files(path, limits):
        height, width = image_size(images[0], limits)
        count = len(images)
        return VideoInfo(
            duration=float(count), num_frames=count, fps=1.0, height=height, width=width
        )
    # A look at the first frames takes as long as to decode a dozen: where there is an
    # index, it says all. What is wrong with a file the second way finds out, too.
    with (
        contextlib.suppress(VideoError),
        open_video(path, limits, header_only=True) as (container, stream),
    ):
        if container.format.name.startswith("mov") and stream.frames:
            return _info(container, stream, path, limits)
    with open_video(path, limits) as (container, stream):
        return _info(container, stream, path, limits)


def _info(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    path: pathlib.Path,
    limits: MediaLimits,
) -> VideoInfo:
    duration = duration_of(container, stream, path)
    fps = float(stream.average_rate or stream.base_rate or 0)
    num_frames = stream.frames or max(1, round(duration * fps))
    limits.check_extent(path, frames=num_frames, seconds=duration, fps=fps)
    return VideoInfo(
        duration=duration,
        num_frames=num_frames,
        fps=fps,
        height=stream.codec_context.height,
        width=stream.codec_context.width,
    )


def sample_times(
    duration: Number, num_frames: int, *, start: Number = 0, end: Number | None = None
) -> Float64[np.ndarray, "F"]:
    """Mid-points of `num_frames` equal spans of the video, in seconds.

    `start` and `end` cut a window out of it; the times stay the file's own.
    """
    end = duration if end is None else end
    if not 0 <= start < end <= duration + 1e-3:
        raise ValueError(
            f"The window from {start:g} to {end:g} s does not lie in a video of"
            f" {duration:g} s; cut the window to the video."
        )
    if num_frames < 1:
        raise ValueError(f"{num_frames=} must be at least 1.")
    return start + (np.arange(num_frames) + 0.5) * ((end - start) / num_frames)


def fps_times(
    duration: Number,
    fps: Number,
    max_frames: int,
    min_frames: int = 1,
    *,
    start: Number = 0,
    end: Number | None = None,
) -> Float64[np.ndarray, "F"]:
    """`fps` times a second, but spread evenly if too many or too few."""
    seconds = (duration if end is None else end) - start
    num_frames = min(max(round(seconds * fps), min_frames, 1), max_frames)
    return sample_times(duration, num_frames, start=start, end=end)


def read_frames(
    path: str | pathlib.Path,
    times: Sequence[float] | np.ndarray,
    fit: Fit | int,
    *,
    limits: MediaLimits = LIMITS,
) -> UInt8[np.ndarray, "F S S 3"]:
    """The frames at `times`, resized as Pillow does; see `iter_frames`."""
    fit = as_fit(fit)
    frames = np.empty((len(times), fit.size, fit.size, 3), np.uint8)
    for i, frame in enumerate(iter_frames(path, times, fit, limits=limits)):
        frames[i] = frame
    return frames


def iter_frames(
    path: str | pathlib.Path,
    times: Sequence[float] | np.ndarray,
    fit: Fit | int,
    *,
    threads: int = 1,
    limits: MediaLimits = LIMITS,
) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
    """Yields the frame on screen at each of `times` (seconds, ascending).

    `fit` says how it becomes a square, or how wide a square to stretch it to.
    It decodes straight on, or seeks where a key frame lies well ahead; the frames are
    the same either way. One frame is held at a time, and one more for each further
    thread that decodes: worth it for one video where cores are idle.
    """
    path, fit = pathlib.Path(path), as_fit(fit)
    times = np.asarray(times, np.float64)
    if np.any(np.diff(times) < 0):
        raise ValueError("Frames are read forwards; sort the times.")
    if images := image_files(path, limits):
        yield from _iter_images(images, times, fit, limits)
        return
    with open_video(path, limits, threads=threads) as (container, stream):
        reader = VideoReader(container, stream, path)
        reader.check_extent(limits)
        yield from reader.frames(times, fit)


# ---------------------------------------------------------------------------
# Images and folders of images.


def _iter_images(
    files: list[pathlib.Path],
    times: Float64[np.ndarray, "F"],
    fit: Fit,
    limits: MediaLimits,
) -> Iterator[np.ndarray]:
    if len(times) and times[-1] > len(files):
        raise VideoError(
            f"{files[0].parent}: {len(files)} images last {len(files)} s at one a"
            f" second, but {times[-1]:g} s was asked for; ask within them."
        )
    index, frame = -1, None
    for wanted in np.clip(times.astype(int), 0, len(files) - 1):
        if wanted != index:
            index, frame = wanted, fit(read_image(files[wanted], limits))
        yield frame
