"""Images as the encoder wants them, pixel for pixel what Pillow makes of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image


def resize_naive(
    image: UInt8[np.ndarray, "H W 3"], size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Bicubic with antialias straight to a square: the aspect is not kept.

    Pillow is the truth, not one of many: encoders were trained on its pixels, and
    other libraries' bicubic is up to 45 levels off.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"An image must be uint8 of shape H W 3, got {image.dtype} {image.shape};"
            " convert it to RGB."
        )
    if image.shape[:2] == (size, size):
        return image
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
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
