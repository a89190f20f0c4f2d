"""The sound files that malformed ones are made from, by real encoders or real cameras.

The clips of the needle data are remuxed to their first second, so that each can be
decoded whole many hundred times.
"""

import pathlib
import shutil

import av
import numpy as np
from PIL import Image

from timeviper_jax.data.needle_sources import clip_path, photo_path

SIDE, FRAMES, FPS = 64, 48, 8
FASTSTART = {"movflags": "faststart"}
# Each with its codec and its container's options.
_FILMS = {
    "behind.mp4": ("libx264", {}),
    "front.mp4": ("libx264", FASTSTART),
    "fragments.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "film.mkv": ("libx264", {}),
    "film.webm": ("libvpx-vp9", {}),
    "film.avi": ("mpeg4", {}),
    "film.ts": ("libx264", {}),
}
_IMAGES = ("png", "jpg", "webp")
_CLIPS = ("bikes.mp4", "carphone_pristine.mp4")


def make(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes them all, once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (codec, options) in _FILMS.items():
        if not (folder / name).exists():
            write_film(folder / name, codec=codec, container_options=options)
    for kind in _IMAGES:
        if not (folder / f"cat.{kind}").exists():
            with Image.open(photo_path("cat")) as image:
                image.resize((160, 120)).save(folder / f"cat.{kind}")
    for name in _CLIPS:
        if not (folder / name).exists():
            first_frames(clip_path(name), folder / name, 24)
    names = [*_FILMS, *(f"cat.{kind}" for kind in _IMAGES), *_CLIPS]
    return [folder / name for name in names]


def write_film(
    path: pathlib.Path,
    *,
    codec: str = "libx264",
    fps: int = FPS,
    frames: int = FRAMES,
    height: int = SIDE,
    width: int = SIDE,
    container_options: dict[str, str] | None = None,
) -> None:
    """A grey level that rises from frame to frame, with noise that moves."""
    noise = np.random.default_rng(0).integers(0, 64, (height, width, 3), np.uint8)
    part = path.with_name(f"part-{path.name}")
    with av.open(str(part), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.gop_size = 12
        container.start_encoding()  # Without frames, there is a header at least.
        for i in range(frames):
            pixels = np.roll(noise, i, axis=1) + np.uint8(3 * i % 190)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    part.rename(path)


def first_frames(source: pathlib.Path, path: pathlib.Path, count: int) -> None:
    """The first packets of a video, as they are."""
    part = path.with_name(f"part-{path.name}")
    with av.open(str(source)) as old, av.open(str(part), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet, _ in zip(old.demux(video=0), range(count), strict=False):
            packet.stream = stream
            new.mux(packet)
    part.rename(path)


def write_sound(path: pathlib.Path) -> None:
    """A second of silence, and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        samples = np.zeros((1, 16_000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def copy(source: pathlib.Path, path: pathlib.Path) -> None:
    """The same bytes under another name."""
    shutil.copyfile(source, path)
