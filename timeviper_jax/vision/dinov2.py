"""DINOv2 with registers: a vision transformer with tokens of its own and LayerScale.

https://arxiv.org/abs/2309.16588. A class token and registers stand before the patches
and are left out of the features, which are those of the second-to-last block without
the final norm, as in vit.py.
"""

import dataclasses

import jax.numpy as jnp
from einops import repeat
from flax import nnx
from jaxtyping import Array, Float, UInt8

from timeviper_jax.vision.blocks import BlockConfig, run_blocks, stack_blocks
from timeviper_jax.vision.vit import VitConfig, patch_embedding, patches

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DinoV2Config(VitConfig):
    """Sizes of a DINOv2.

    `class_position` says that the class token has a position of its own, before the
    patches', as in transformers' checkpoints; timm's have it added to the token.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    num_registers: int = 4
    class_position: bool = False

    @property
    def own_tokens(self) -> int:
        return 1 + self.num_registers

    @property
    def block(self) -> BlockConfig:
        return dataclasses.replace(super().block, layer_scale=1e-5)


class DinoV2(nnx.Module):
    """Frames to one feature per patch, row by row."""

    def __init__(self, cfg: DinoV2Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch = patch_embedding(cfg, rngs=rngs)

        def draw(std: float, *shape: int) -> nnx.Param:
            normal = nnx.initializers.normal(std)
            return nnx.Param(normal(rngs.params(), shape, cfg.param_dtype))

        self.class_token = draw(1e-6, cfg.embed_dim)
        self.registers = draw(1e-6, cfg.num_registers, cfg.embed_dim)
        with_position = cfg.num_tokens + cfg.class_position
        self.positions = draw(0.02, with_position, cfg.embed_dim)
        self.blocks = stack_blocks(cfg.block, cfg.depth - 1, rngs=rngs)

    def __call__(
        self, frames: UInt8[Array, "B H W C"] | Float[Array, "B H W C"]
    ) -> Float[Array, "B V E"]:
        """Encodes frames: uint8 pixels, or floats that are already normalised."""
        cfg = self.cfg
        x = self.patch(patches(frames, cfg))
        first, registers, positions = (
            param[...].astype(cfg.dtype)
            for param in (self.class_token, self.registers, self.positions)
        )
        if cfg.class_position:
            first, positions = first + positions[0], positions[1:]
        prefix = jnp.concatenate([first[None], registers])
        prefix = repeat(prefix, "R E -> B R E", B=len(x))
        x = jnp.concatenate([prefix, x + positions], axis=1)
        x = run_blocks(self.blocks, x, unroll=cfg.unroll, remat=cfg.remat)
        return x[:, 1 + cfg.num_registers :]
