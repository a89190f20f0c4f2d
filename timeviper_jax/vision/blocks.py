"""The encoders' transformer block, pre-norm and bidirectional, and stacks of it."""

import dataclasses
from functools import partial
from typing import Literal

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.attention import attention
from timeviper_jax.layers.norm import RMSNorm

Norm = Literal["layer", "rms"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Sizes of one block, and what its family adds to the plain one.

    `qk_norm` puts an RMS norm over all heads together on queries and on keys.
    `layer_scale` multiplies what a block adds, channel by channel, by factors that
    start at this value; 0 leaves them out.
    """

    embed_dim: int
    num_heads: int
    mlp_dim: int
    norm: Norm = "layer"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} must be a multiple of"
                f" num_heads={self.num_heads}."
            )

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


def _xavier(in_axis: int | tuple[int, ...], out_axis: int | tuple[int, ...]):
    return nnx.initializers.variance_scaling(
        1.0, "fan_avg", "uniform", in_axis=in_axis, out_axis=out_axis
    )


def _rms_norm(cfg: BlockConfig, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(
        cfg.embed_dim, eps=cfg.norm_eps, param_dtype=cfg.param_dtype, rngs=rngs
    )


class SelfAttention(nnx.Module):
    """Every token attends to every token of its image or clip."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        E, N, H = cfg.embed_dim, cfg.num_heads, cfg.head_dim
        einsum = partial(
            nnx.Einsum, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs
        )
        heads = partial(
            einsum,
            "BVE,ENH->BVNH",
            (E, N, H),
            (N, H) if cfg.qkv_bias else None,
            kernel_init=_xavier(0, (1, 2)),
        )
        self.q, self.k, self.v = heads(), heads(), heads()
        self.out = einsum(
            "BVNH,NHE->BVE", (N, H, E), (E,), kernel_init=_xavier((0, 1), 2)
        )
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm:
            self.q_norm, self.k_norm = _rms_norm(cfg, rngs), _rms_norm(cfg, rngs)

    def __call__(self, x: Float[Array, "B V E"]) -> Float[Array, "B V E"]:
        q, k = self.q(x), self.k(x)
        if self.qk_norm:
            q, k = _over_heads(self.q_norm, q), _over_heads(self.k_norm, k)
        return self.out(attention(q, k, self.v(x), causal=False))


def _over_heads(norm: RMSNorm, x: Float[Array, "B V N H"]) -> Float[Array, "B V N H"]:
    return norm(rearrange(x, "B V N H -> B V (N H)")).reshape(x.shape)


class MLP(nnx.Module):
    """Up, exact GELU, down."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        linear = partial(
            nnx.Linear,
            kernel_init=_xavier(0, 1),
            bias_init=nnx.initializers.normal(1e-6),
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            rngs=rngs,
        )
        self.up = linear(cfg.embed_dim, cfg.mlp_dim)
        self.down = linear(cfg.mlp_dim, cfg.embed_dim)

    def __call__(self, x: Float[Array, "B V E"]) -> Float[Array, "B V E"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class LayerScale(nnx.Module):
    """A factor for each channel."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.constant(cfg.layer_scale)
        self.scale = nnx.Param(init(rngs.params(), (cfg.embed_dim,), cfg.param_dtype))

    def __call__(self, x: Float[Array, "B V E"]) -> Float[Array, "B V E"]:
        return x * self.scale[...].astype(x.dtype)


def _unscaled(x: Float[Array, "B V E"]) -> Float[Array, "B V E"]:
    return x


class Block(nnx.Module):
    """Attention, then MLP, each on the normed residual and added to it."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        # Statistics are in float32 whatever the dtype; the two-pass variance keeps
        # them exact where a channel's mean is large.
        layer_norm = partial(
            nnx.LayerNorm,
            cfg.embed_dim,
            epsilon=cfg.norm_eps,
            use_fast_variance=False,
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            rngs=rngs,
        )
        norm = layer_norm if cfg.norm == "layer" else partial(_rms_norm, cfg, rngs)
        self.norm1, self.norm2 = norm(), norm()
        self.attn = SelfAttention(cfg, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        self.scale1, self.scale2 = (
            LayerScale(cfg, rngs=rngs) if cfg.layer_scale else _unscaled
            for _ in range(2)
        )

    def __call__(self, x: Float[Array, "B V E"]) -> Float[Array, "B V E"]:
        x = x + self.scale1(self.attn(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


def stack_blocks(cfg: BlockConfig, count: int, *, rngs: nnx.Rngs) -> Block:
    """`count` blocks as one, their parameters stacked on a leading axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Block:
        return Block(cfg, rngs=rngs)

    return stack(rngs)


def run_blocks(
    blocks: Block, x: Float[Array, "B V E"], *, unroll: bool, remat: bool
) -> Float[Array, "B V E"]:
    """`x` through stacked blocks, one after the other.

    `unroll` lays them out instead of scanning over them; `remat` recomputes them in
    the backward pass.
    """
    definition, layers = nnx.split(blocks)

    def one_block(x, layer):
        return nnx.merge(definition, layer)(x), None

    if remat:
        one_block = jax.checkpoint(one_block, prevent_cse=unroll)
    return jax.lax.scan(one_block, x, layers, unroll=unroll)[0]
