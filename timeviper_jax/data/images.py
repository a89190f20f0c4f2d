"""Images as the encoder wants them, pixel for pixel what Pillow makes of them."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

Colour = tuple[int, int, int]
Resize = Literal["resize-naive", "resize-crop", "letterbox"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """How an image of any shape becomes a square of `size` pixels a side.

    `resize-naive` stretches it; `resize-crop` scales its shorter side and keeps the
    middle; `letterbox` first fills it up to a square with the colour `fill`.
    """

    size: int
    resize: str = "resize-naive"
    fill: Colour = (127, 127, 127)

    def __post_init__(self):
        if self.resize not in get_args(Resize):
            raise ValueError(
                f"resize={self.resize!r} is not one of {get_args(Resize)}."
            )

    def __call__(
        self, image: UInt8[np.ndarray, "H W 3"]
    ) -> UInt8[np.ndarray, "{self.size} {self.size} 3"]:
        if self.resize == "resize-naive":
            return resize_naive(image, self.size)
        if self.resize == "letterbox":
            image = pad_to_square(image, self.fill)
        return resize_crop(image, self.size)


def as_fit(fit: Fit | int) -> Fit:
    """A number is the size of a square to stretch to."""
    return fit if isinstance(fit, Fit) else Fit(size=fit)


def fill_of(mean: Sequence[float]) -> Colour:
    """The colour an encoder calls the mean, rounded down as the release does."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def resize_naive(
    image: UInt8[np.ndarray, "H W 3"], size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Bicubic with antialias straight to a square: the aspect is not kept.

    Pillow is the truth, not one of many: encoders were trained on its pixels, and
    other libraries' bicubic is up to 45 levels off.
    """
    return _bicubic(image, size, size)


def resize_crop(
    image: UInt8[np.ndarray, "H W 3"], size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Bicubic until the shorter side is `size`, then the square in the middle.

    Rounded as torchvision does: the longer side down, the cut to the even.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    image = _bicubic(image, size * height // shorter, size * width // shorter)
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def pad_to_square(
    image: UInt8[np.ndarray, "H W 3"], fill: Colour
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Equal bars of the colour on both sides; an odd pixel is left over."""
    height, width = image.shape[:2]
    top, left = ((max(height, width) - side) // 2 for side in (height, width))
    square = np.full((height + 2 * top, width + 2 * left, 3), fill, np.uint8)
    square[top : top + height, left : left + width] = image
    return square


def _bicubic(
    image: UInt8[np.ndarray, "H W 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"An image must be uint8 of shape H W 3, got {image.dtype} {image.shape};"
            " convert it to RGB."
        )
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def normalise(
    frames: UInt8[np.ndarray, "*F H W C"], mean: Sequence[float], std: Sequence[float]
) -> Float32[np.ndarray, "*F H W C"]:
    """`(frames / 255 - mean) / std` per colour.

    The encoder does the same to uint8 frames; this is for those who want to see what
    it sees.
    """
    pixels = frames.astype(np.float32) / 255
    return (pixels - np.float32(mean)) / np.float32(std)
