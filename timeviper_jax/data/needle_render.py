"""From a plan to an encoded file: haystack shots, photographs over them, H.264.

Frames are composed as planar YUV 4:2:0, the encoder's own format, a shot at a time.
"""

import dataclasses
import fractions
import pathlib
from collections.abc import Callable, Iterable, Iterator

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from timeviper_jax.data import needle_sources as sources
from timeviper_jax.data.needle_scenes import Scene, Showing


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """How frames look and how they are encoded."""

    size: int = 64  # Pixels, even.
    shots: int = 768  # Different shots in the pool of a split.
    shot_frames: tuple[int, int] = (2, sources.SHOT)
    photo_share: tuple[float, float] = (0.6875, 1.0)  # 44 to 64 of 64 pixels.
    crf: int = 25
    preset: str = "ultrafast"
    gop: int = 16

    def __post_init__(self):
        if self.size % 4 or self.size < 16:
            raise ValueError(f"size={self.size} must be a multiple of 4, at least 16.")
        low, high = self.shot_frames
        if not 1 <= low <= high <= sources.SHOT:
            raise ValueError(
                f"shot_frames={self.shot_frames} must lie within 1 to {sources.SHOT}."
            )
        low, high = self.photo_share
        if not 0.1 <= low <= high <= 1:
            raise ValueError(f"photo_share={self.photo_share} must lie in 0.1 to 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlay:
    """A photograph's pixels and their corner, in pixels of chroma: half the frame's."""

    top: int
    left: int
    luma: UInt8[np.ndarray, "F S S"]
    chroma: UInt8[np.ndarray, "F S/2 S/2 2"]


def draw_overlay(
    rng: np.random.Generator,
    image: Image.Image,
    view: sources.View,
    frames: int,
    cfg: RenderConfig,
) -> Overlay:
    """One showing of a photograph: a slowly drifting view of it, somewhere in frame."""
    low, high = (round(share * cfg.size) // 2 for share in cfg.photo_share)
    half = int(rng.integers(low, high + 1))
    side = rng.uniform(*view.scales) * min(image.size)
    boxes = sources.drifting_boxes(rng, *image.size, side, frames, speed=0.015)
    pixels = sources.crops([image] * frames, boxes, 2 * half)
    if view.mirrored:
        pixels = pixels[:, :, ::-1]
    luma, chroma = sources.yuv420(pixels)
    luma = _relight(rng, luma)
    top, left = rng.integers(0, cfg.size // 2 - half + 1, 2).tolist()
    return Overlay(top=top, left=left, luma=luma, chroma=chroma)


def _relight(rng: np.random.Generator, luma: np.ndarray) -> np.ndarray:
    """Changes contrast and brightness, within the limited range of video."""
    gain, offset = rng.uniform(0.75, 1.2), rng.uniform(-16, 16)
    levels = np.clip((np.arange(256) - 126) * gain + 126 + offset, 16, 235)
    return levels.astype(np.uint8)[luma]


def _planes(packed: UInt8[np.ndarray, "F Z"], size: int) -> list[np.ndarray]:
    """Views of packed frames: luma, then the two half-size chroma planes."""
    F, luma, half = len(packed), size * size, size // 2
    y = packed[:, :luma].reshape(F, size, size)
    u, v = np.moveaxis(packed[:, luma:].reshape(F, 2, half, half), 1, 0)
    return [y, u, v]


def draw_haystack_frames(
    rng: np.random.Generator, pool: sources.Haystack, seconds: int, cfg: RenderConfig
) -> UInt8[np.ndarray, "F Z"]:
    """`seconds` frames of shots that follow each other without a break."""
    packed = np.empty((seconds, cfg.size * cfg.size * 3 // 2), np.uint8)
    y, u, v = _planes(packed, cfg.size)
    at = 0
    while at < seconds:
        low, high = cfg.shot_frames
        count = min(int(rng.integers(low, high + 1)), seconds - at)
        now = slice(at, at + count)
        y[now], chroma = _draw_shot(rng, pool, count, cfg.size)
        u[now], v[now] = np.moveaxis(chroma, -1, 0)
        at += count
    return packed


def _draw_shot(
    rng: np.random.Generator, pool: sources.Haystack, count: int, size: int
) -> tuple[UInt8[np.ndarray, "F S S"], UInt8[np.ndarray, "F S/2 S/2 2"]]:
    """Luma and chroma of a shot: cut, turned and lit at random."""
    shot = rng.integers(len(pool.luma))
    first = rng.integers(0, sources.SHOT - count + 1)
    moments = slice(first, first + count)
    slack = pool.chroma.shape[2] - size // 2
    top, left = rng.integers(0, slack + 1, 2).tolist()
    mirror = -1 if rng.random() < 0.5 else 1
    luma = _window(pool.luma[shot, moments], 2 * top, 2 * left, size)
    chroma = _window(pool.chroma[shot, moments], top, left, size // 2)
    return _relight(rng, luma)[:, :, ::mirror], chroma[:, :, ::mirror]


def paste(packed: UInt8[np.ndarray, "F Z"], overlay: Overlay, size: int) -> None:
    """Writes an overlay over packed frames, in place."""
    y, u, v = _planes(packed, size)
    top, left, half = overlay.top, overlay.left, overlay.chroma.shape[1]
    _window(y, 2 * top, 2 * left, 2 * half)[:] = overlay.luma
    _window(u, top, left, half)[:] = overlay.chroma[..., 0]
    _window(v, top, left, half)[:] = overlay.chroma[..., 1]


def _window(plane: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    return plane[:, top : top + side, left : left + side]


def render_scene(
    rng: np.random.Generator,
    scene: Scene,
    pool: sources.Haystack,
    look: Callable[[Showing], tuple[Image.Image, sources.View]],
    cfg: RenderConfig,
) -> UInt8[np.ndarray, "F Z"]:
    """The packed frames of one scene; `look` says what a showing shows."""
    packed = draw_haystack_frames(rng, pool, scene.length, cfg)
    for showing in scene.showings:
        image, view = look(showing)
        overlay = draw_overlay(rng, image, view, showing.stop - showing.start, cfg)
        now = slice(showing.start - scene.start, showing.stop - scene.start)
        paste(packed[now], overlay, cfg.size)
    return packed


def _frames(
    blocks: Iterable[UInt8[np.ndarray, "F Z"]], size: int
) -> Iterator[av.VideoFrame]:
    for block in blocks:
        for packed in block.reshape(-1, size * 3 // 2, size):
            yield av.VideoFrame.from_ndarray(packed, format="yuv420p")


def encode(
    path: pathlib.Path, blocks: Iterable[UInt8[np.ndarray, "F Z"]], cfg: RenderConfig
) -> None:
    """Writes packed frames as H.264 at 1 fps; the file appears only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    options = {"preset": cfg.preset, "crf": str(cfg.crf), "tune": "fastdecode"}
    with av.open(
        str(part), "w", format="mp4", options={"movflags": "faststart"}
    ) as container:
        stream = container.add_stream("libx264", rate=1, options=options)
        stream.width = stream.height = cfg.size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.gop_size, context.thread_count = cfg.gop, 1
        context.time_base = fractions.Fraction(1, 1)
        for second, frame in enumerate(_frames(blocks, cfg.size)):
            frame.pts = second
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    part.replace(path)
