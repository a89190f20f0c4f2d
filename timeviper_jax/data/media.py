"""Opening media that strangers made: what kinds are read, and up to which sizes.

Whatever a file says of itself is held against `MediaLimits` before anything is made
of that size. Only files are opened, by demuxers and decoders that are named here, so
that no list, playlist or reference inside one leads to another file or to a network.
"""

import contextlib
import dataclasses
import pathlib
import struct
import warnings
import zlib
from collections.abc import Iterator

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

Number = float | int

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
# FFmpeg's names; a demuxer goes by several.
CONTAINERS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi"),
    *("mpegts", "mpeg", "mpegvideo", "flv", "live_flv", "asf", "ogg", "gif"),
    *("h264", "hevc", "ivf", "obu"),
)
CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx"),
    *("libvpx-vp9", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v2", "msmpeg4"),
    *("h263", "flv", "mjpeg", "theora", "prores", "dnxhd", "wmv1", "wmv2", "wmv3"),
    *("vc1", "ffv1", "gif"),
)
# What Pillow's readers raise for bytes that no writer wrote.
_IMAGE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError),
    MemoryError,
    *(struct.error, zlib.error, AttributeError, NotImplementedError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


class VideoError(Exception):
    """A media file that cannot give the frames asked of it; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """The most that a media file may be, or say that it is."""

    max_bytes: int = 64 << 30
    max_pixels: int = 1 << 26  # Of a frame: 8192 x 8192.
    max_side: int = 1 << 14
    max_aspect: int = 100  # A long side over a short one; letterboxes are square.
    max_frames: int = 20_000_000  # Declared, or duration times fps.
    max_seconds: Number = 7 * 86_400
    max_fps: Number = 1_000
    containers: tuple[str, ...] = CONTAINERS
    codecs: tuple[str, ...] = CODECS

    def check_size(self, path: pathlib.Path, height: int, width: int) -> None:
        """Raises `VideoError` unless a frame of this size may be made."""
        short, long = sorted((height, width))
        if short < 1:
            raise VideoError(f"{path}: frames of {width} x {height}; replace the file.")
        self._check(path, "pixels a frame", height * width, self.max_pixels)
        self._check(path, "pixels a side", long, self.max_side)
        self._check(path, "times as long as wide", long / short, self.max_aspect)

    def check_extent(
        self, path: pathlib.Path, *, frames: Number, seconds: Number, fps: Number
    ) -> None:
        """Raises `VideoError` unless a video may be as long as this one says."""
        self._check(path, "frames", frames, self.max_frames)
        self._check(path, "seconds", seconds, self.max_seconds)
        self._check(path, "frames a second", fps, self.max_fps)

    def check_file(self, path: pathlib.Path) -> None:
        """Raises `VideoError` unless `path` is a plain file that is not too large."""
        if not str(path).isprintable():
            raise VideoError(f"{str(path)!r}: no printable name; rename the file.")
        try:
            if not path.exists():
                raise VideoError(f"{path}: no such file; check the path.")
            # A pipe or a device may never end.
            if not path.is_file():
                raise VideoError(f"{path}: neither a file nor a folder of images.")
            size = path.stat().st_size
        except OSError as error:
            raise VideoError(f"{path}: cannot be read ({one_line(error)}).") from error
        self._check(path, "bytes", size, self.max_bytes)

    @staticmethod
    def _check(path: pathlib.Path, what: str, value: Number, most: Number) -> None:
        if value > most:
            raise VideoError(
                f"{path}: {value:.12g} {what}, but the limit is {most:.12g}; raise it"
                " in MediaLimits if the file is to be trusted."
            )


def is_image(path: str | pathlib.Path) -> bool:
    """Whether `path` is a still picture, to be shown once, by its name."""
    return pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES


def image_files(path: pathlib.Path, limits: MediaLimits) -> list[pathlib.Path]:
    """The images that `path` stands for; none if it is a video file."""
    if not path.is_dir():
        return [path] if is_image(path) else []
    files = sorted(filter(is_image, path.iterdir()))
    if not files:
        raise VideoError(
            f"{path}: a folder without images; put its frames there as"
            f" {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    limits.check_extent(path, frames=len(files), seconds=len(files), fps=1)
    folder = path.resolve()
    for file in filter(pathlib.Path.is_symlink, files):
        if not file.resolve().is_relative_to(folder):
            raise VideoError(f"{file}: a link that leaves its folder; copy the image.")
    return files


def read_image(path: pathlib.Path, limits: MediaLimits) -> UInt8[np.ndarray, "H W 3"]:
    """The picture, upright, in RGB."""
    with _open_image(path, limits) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image.convert("RGB"))


def image_size(path: pathlib.Path, limits: MediaLimits) -> tuple[int, int]:
    """Height and width as the file says, before any turning upright."""
    with _open_image(path, limits) as image:
        return image.height, image.width


@contextlib.contextmanager
def _open_image(path: pathlib.Path, limits: MediaLimits) -> Iterator[Image.Image]:
    """The picture, its pixels not yet read; errors name the file."""
    limits.check_file(path)
    try:
        with (
            warnings.catch_warnings(),
            Image.open(path, formats=_IMAGE_FORMATS) as image,
        ):
            limits.check_size(path, image.height, image.width)
            yield image
    except _IMAGE_ERRORS as error:
        raise VideoError(
            f"{path}: not a readable image ({one_line(error)}); replace the file."
        ) from error


@contextlib.contextmanager
def open_video(
    path: pathlib.Path,
    limits: MediaLimits,
    *,
    threads: int = 1,
    header_only: bool = False,
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a video for decoding; errors name the file.

    With `header_only` no frames are decoded to find out what the header does not say.
    """
    limits.check_file(path)
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join(limits.containers),
        "codec_whitelist": ",".join(limits.codecs),
        "max_pixels": str(limits.max_pixels),
    }
    if header_only:
        options["probesize"] = "32"  # The least that FFmpeg takes.
    try:
        # With its protocol: a name like "concat:a|b.mp4" is a file's name, too.
        with av.open(f"file:{path}", options=options) as container:
            stream = _video_stream(container, path, limits)
            stream.thread_type = "SLICE" if threads == 1 else "FRAME"
            stream.codec_context.thread_count = threads
            # A stream may change its size in the middle.
            stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"{path}: not a video that can be decoded ({one_line(error)}); it may be"
            " damaged or of another kind: replace it."
        ) from error


def _video_stream(
    container: av.container.InputContainer, path: pathlib.Path, limits: MediaLimits
) -> av.VideoStream:
    if not container.streams.video:
        raise VideoError(
            f"{path}: not a video, or cut short before its first frame; give another"
            " file."
        )
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None or context.name not in limits.codecs:
        name = "unknown" if context is None else context.name
        raise VideoError(
            f"{path}: its codec, {name}, is not among those that are decoded; write"
            " it again as H.264."
        )
    limits.check_size(path, context.height, context.width)
    return stream


def one_line(error: Exception) -> str:
    """The reason that an error gives, without its line breaks."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
