"""InternVideo2's encoder: the patches of a clip's frames attend to one another.

https://arxiv.org/abs/2403.15377. Images pass alone, with positions of their own. The
features are those of the second-to-last block, without the class token; there is no
norm after it. The authors of TimeViper fold longer videos in a way that mixes channels
and time; here a video is always cut into clips.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, UInt8

from timeviper_jax.vision.blocks import BlockConfig, run_blocks, stack_blocks
from timeviper_jax.vision.dinov2 import IMAGENET_MEAN, IMAGENET_STD
from timeviper_jax.vision.vit import VitConfig, patch_embedding, patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVideo2Config(VitConfig):
    """Sizes of an InternVideo2; a clip has `frames` of them."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    frames: int = 4

    @property
    def clip_frames(self) -> int:
        return self.frames

    @property
    def own_tokens(self) -> int:
        return 1

    @property
    def block(self) -> BlockConfig:
        return dataclasses.replace(
            super().block,
            norm="rms",
            qkv_bias=False,
            qk_norm=True,
            layer_scale=1e-5,
        )


class InternVideo2(nnx.Module):
    """Clips to one feature per patch: frame by frame, and row by row in each."""

    def __init__(self, cfg: InternVideo2Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch = patch_embedding(cfg, rngs=rngs)
        normal = nnx.initializers.normal(0.02)
        self.class_token = nnx.Param(
            normal(rngs.params(), (cfg.embed_dim,), cfg.param_dtype)
        )
        self.positions, self.image_positions = (
            nnx.Param(jnp.asarray(_with_class(frames, cfg), cfg.param_dtype))
            for frames in (cfg.frames, 1)
        )
        self.blocks = stack_blocks(cfg.block, cfg.depth - 1, rngs=rngs)

    def __call__(
        self, clips: UInt8[Array, "B F H W C"] | Float[Array, "B F H W C"]
    ) -> Float[Array, "B V E"]:
        """Encodes clips, or images where F = 1: pixels, or normalised floats.

        The features of a clip's frames follow one another: V counts those of all.
        """
        cfg, F = self.cfg, clips.shape[1]
        if F not in (1, cfg.frames):
            raise ValueError(
                f"{F} frames are neither a clip of {cfg.frames} nor an image."
            )
        positions = self.image_positions if F == 1 else self.positions
        x = rearrange(self.patch(patches(clips, cfg)), "B F V E -> B (F V) E")
        first = self.class_token[...].astype(cfg.dtype)
        x = jnp.concatenate([repeat(first, "E -> B 1 E", B=len(x)), x], axis=1)
        x = x + positions[...].astype(cfg.dtype)
        return run_blocks(self.blocks, x, unroll=cfg.unroll, remat=cfg.remat)[:, 1:]


def _with_class(
    frames: int, cfg: InternVideo2Config
) -> Float[np.ndarray, "{1+frames*cfg.num_tokens} {cfg.embed_dim}"]:
    """The positions of a clip's patches, and zeros before them for the class."""
    return np.pad(space_time_waves(frames, cfg.grid, cfg.embed_dim), [(1, 0), (0, 0)])


def space_time_waves(
    frames: int, grid: int, dim: int
) -> Float[np.ndarray, "{frames*grid*grid} {dim}"]:
    """Sines and cosines of the frame (a quarter of the width), column and row.

    They are where positions start from in training.
    """
    if dim % 16:
        raise ValueError(f"{dim=} does not hold waves of three axes; use 16 k.")
    time, row, column = np.meshgrid(
        *(np.arange(size) for size in (frames, grid, grid)), indexing="ij"
    )
    parts = [(time, dim // 4), (column, dim // 4 * 3 // 2), (row, dim // 4 * 3 // 2)]
    return np.concatenate([_waves(at.ravel(), width) for at, width in parts], axis=1)


def _waves(at: np.ndarray, dim: int) -> Float[np.ndarray, "V {dim}"]:
    angles = at[:, None] / 10_000 ** (np.arange(dim // 2) / (dim / 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
