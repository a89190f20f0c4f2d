"""The vision transformer of SigLIP, in timm's form, as a video model uses it.

https://arxiv.org/abs/2303.15343. Its features are the output of the second-to-last
block without the final norm, so the last block, the norm and the pooling head are not
built: a model published as `depth` blocks has `depth - 1` here.
"""

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, UInt8

from timeviper_jax.vision.blocks import BlockConfig, run_blocks, stack_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Sizes of an encoder; `depth` is the published one.

    `mean` and `std` are of pixels in [0, 1]. `unroll` lays the blocks out one after
    the other instead of scanning over them; `remat` recomputes them in the backward
    pass.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    norm_eps: float = 1e-6
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    unroll: bool = False
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.depth < 2:
            raise ValueError(
                f"depth={self.depth} leaves no second-to-last block; use 2 or more."
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} must hold at least one patch of"
                f" {self.patch_size}."
            )

    @property
    def clip_frames(self) -> int:
        """Frames that are encoded together."""
        return 1

    @property
    def grid(self) -> int:
        """Patches along a side; pixels that fill no patch are left out."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Features of a frame."""
        return self.grid**2

    @property
    def own_tokens(self) -> int:
        """Tokens that go through the blocks beside the patches of a frame or clip."""
        return 0

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )


class Vit(nnx.Module):
    """Frames to one feature per patch, row by row.

    Initialised as SigLIP is, for training from scratch. The blocks' parameters are
    stacked on a leading axis.
    """

    def __init__(self, cfg: VitConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch = patch_embedding(cfg, rngs=rngs)
        positions = nnx.initializers.normal(cfg.embed_dim**-0.5)
        self.positions = nnx.Param(
            positions(rngs.params(), (cfg.num_tokens, cfg.embed_dim), cfg.param_dtype)
        )
        self.blocks = stack_blocks(cfg.block, cfg.depth - 1, rngs=rngs)

    def __call__(
        self, frames: UInt8[Array, "B H W C"] | Float[Array, "B H W C"]
    ) -> Float[Array, "B V E"]:
        """Encodes frames: uint8 pixels, or floats that are already normalised."""
        cfg = self.cfg
        x = self.patch(patches(frames, cfg)) + self.positions[...].astype(cfg.dtype)
        return run_blocks(self.blocks, x, unroll=cfg.unroll, remat=cfg.remat)


def patch_embedding(cfg: VitConfig, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A flattened patch to a token."""
    return nnx.Linear(
        3 * cfg.patch_size**2,
        cfg.embed_dim,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        rngs=rngs,
    )


def patches(
    frames: UInt8[Array, "*B H W C"] | Float[Array, "*B H W C"], cfg: VitConfig
) -> Float[Array, "*B V X"]:
    """Flattened patches of normalised pixels, each row by row, colours last."""
    size, patch = cfg.image_size, cfg.patch_size
    if frames.shape[-3:] != (size, size, 3):
        lead = "B" if frames.ndim == 4 else "B F"
        raise ValueError(
            f"Frames of shape {frames.shape} are not {lead} {size} {size} 3;"
            " resize them."
        )
    if frames.dtype == jnp.uint8:
        frames = normalise(frames, cfg.mean, cfg.std)
    whole = cfg.grid * patch
    return rearrange(
        frames[..., :whole, :whole, :].astype(cfg.dtype),
        "... (h p) (w q) C -> ... (h w) (p q C)",
        p=patch,
        q=patch,
    )


def normalise(
    frames: UInt8[Array, "*B C"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "*B C"]:
    """`(frames / 255 - mean) / std` per colour, in float32."""
    pixels = frames.astype(jnp.float32) / 255
    return (pixels - jnp.array(mean)) / jnp.array(std)
