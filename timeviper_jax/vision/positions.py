"""Position tables for another grid or clip length than they were trained for.

The arithmetic is PyTorch's, whose resampling the published models were made with. Runs
in NumPy when weights are loaded.
"""

from collections.abc import Callable

import numpy as np
from einops import rearrange
from jaxtyping import Float, Num

Weights = Float[np.ndarray, "{new} {old}"]


def resize_grid(
    positions: Num[np.ndarray, "*F V E"], grid: int, *, antialias: bool
) -> Num[np.ndarray, "*F {grid*grid} E"]:
    """Bicubic, to `grid` rows of as many: V is a square too.

    With `antialias` as timm does it, else as InternVideo2 and transformers do. The two
    differ when enlarging, too: torch bends the first kernel less.
    """
    old = round(positions.shape[-2] ** 0.5)
    if old**2 != positions.shape[-2]:
        raise ValueError(f"{positions.shape[-2]} positions are not a square grid.")
    if old == grid:
        return positions
    weights = (smooth_cubic if antialias else cubic)(old, grid)
    table = rearrange(positions, "... (h w) E -> ... h w E", h=old)
    table = np.einsum("yh,xw,...hwE->...yxE", weights, weights, table, optimize=True)
    resized = rearrange(table, "... h w E -> ... (h w) E")
    return resized.astype(positions.dtype)


def resize_time(
    positions: Num[np.ndarray, "F V E"], frames: int
) -> Num[np.ndarray, "{frames} V E"]:
    """Linear between frames, to a clip of another length."""
    if len(positions) == frames:
        return positions
    resized = np.einsum("fF,FVE->fVE", linear(len(positions), frames), positions)
    return resized.astype(positions.dtype)


def linear(old: int, new: int) -> Weights:
    """What each of `new` points takes of `old` ones, piecewise linearly."""
    return _interpolate(old, new, reach=1, kernel=lambda x: np.maximum(0, 1 - x))


def cubic(old: int, new: int) -> Weights:
    """The same by cubic convolution; beyond the edge the last value goes on."""
    return _interpolate(old, new, reach=2, kernel=lambda x: _cubic(x, -0.75))


def smooth_cubic(old: int, new: int) -> Weights:
    """By cubic convolution as wide as a new point; beyond the edge there is nothing."""
    ratio = old / new
    width = max(ratio, 1.0)
    distance = np.abs(_centres(old, new)[:, None] - np.arange(old)) / width
    weights = _cubic(distance, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _interpolate(
    old: int, new: int, *, reach: int, kernel: Callable[[np.ndarray], np.ndarray]
) -> Weights:
    centres, weights = _centres(old, new), np.zeros((new, old))
    for step in range(1 - reach, 1 + reach):
        at = np.floor(centres) + step
        inside = np.clip(at, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), inside), kernel(np.abs(centres - at)))
    return weights


def _centres(old: int, new: int) -> Float[np.ndarray, " {new}"]:
    """Where the centres of new points lie among the old, whose own are 0, 1, 2 …"""
    return (np.arange(new) + 0.5) * (old / new) - 0.5


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel at distance x >= 0."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
