"""A film of any length to watch: 640 × 360, one frame a second, H.264.

Shots of 2 to 8 seconds from the clips of the needle videos, each a window of its own
that drifts. One photograph is shown once, early, so that there is something to ask.
"""

import fractions
import pathlib
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from timeviper_jax.data import needle_sources as sources

WIDTH, HEIGHT = 640, 360
NEEDLE, NEEDLE_SECONDS = "coffee", range(100, 108)
QUESTION = "Which is shown, cat, coffee, page or moon?"


def make(path: pathlib.Path, seconds: int, *, seed: int = 0) -> None:
    """Writes the film; the file appears only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    options = {"preset": "ultrafast", "crf": "30", "tune": "fastdecode"}
    with av.open(
        str(part), "w", format="mp4", options={"movflags": "faststart"}
    ) as container:
        stream = container.add_stream("libx264", rate=1, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = 32
        stream.codec_context.time_base = fractions.Fraction(1, 1)
        images = tqdm(
            _images(seconds, seed), "film", seconds, unit="frame", disable=None
        )
        for second, image in enumerate(images):
            frame = av.VideoFrame.from_image(image)
            frame.pts = second
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    part.replace(path)


def _images(seconds: int, seed: int) -> Iterator[Image.Image]:
    rng, made = np.random.default_rng(seed), 0
    clips = [
        sources.load_clip(sources.clip_path(name), HEIGHT) for name in sources.CLIPS
    ]
    needle = sources.photo(NEEDLE).resize((WIDTH * 7 // 8, HEIGHT * 7 // 8))
    while made < seconds:
        for image in _shot(rng, clips[rng.integers(len(clips))]):
            if made in NEEDLE_SECONDS:
                image.paste(needle, (WIDTH // 16, HEIGHT // 16))
            yield image
            made += 1
            if made == seconds:
                return


def _shot(rng: np.random.Generator, clip: list[Image.Image]) -> Iterator[Image.Image]:
    """A few frames of a clip, through a window of its own."""
    length = int(rng.integers(2, sources.SHOT + 1))
    first = int(rng.integers(len(clip) - length + 1))
    wide, high = clip[first].size
    share = rng.uniform(0.5, 1.0) * min(wide / WIDTH, high / HEIGHT)
    size = np.array([WIDTH, HEIGHT]) * share
    corner = rng.random(2) * ([wide, high] - size)
    mirrored = rng.random() < 0.5
    for image in clip[first : first + length]:
        box = (*corner, *(corner + size))
        shown = image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box)
        if mirrored:
            shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        yield shown
