"""The encoders' transformer block: pre-norm, bidirectional, with biases."""

import dataclasses
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.attention import attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Sizes of one block."""

    embed_dim: int
    num_heads: int
    mlp_dim: int
    norm_eps: float = 1e-6
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


class SelfAttention(nnx.Module):
    """Every token attends to every token of its image."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        E, N, H = cfg.embed_dim, cfg.num_heads, cfg.head_dim
        einsum = partial(
            nnx.Einsum, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs
        )
        heads = partial(
            einsum, "BVE,ENH->BVNH", (E, N, H), (N, H), kernel_init=_xavier(0, (1, 2))
        )
        self.q, self.k, self.v = heads(), heads(), heads()
        self.out = einsum(
            "BVNH,NHE->BVE", (N, H, E), (E,), kernel_init=_xavier((0, 1), 2)
        )

    def __call__(self, x: Float[Array, "B V E"]) -> Float[Array, "B V E"]:
        return self.out(attention(self.q(x), self.k(x), self.v(x), causal=False))


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


class Block(nnx.Module):
    """Attention, then MLP, each on the normed residual and added to it."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        # Statistics are in float32 whatever the dtype; the two-pass variance keeps
        # them exact where a channel's mean is large.
        norm = partial(
            nnx.LayerNorm,
            cfg.embed_dim,
            epsilon=cfg.norm_eps,
            use_fast_variance=False,
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            rngs=rngs,
        )
        self.norm1, self.norm2 = norm(), norm()
        self.attn = SelfAttention(cfg, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "B V E"]) -> Float[Array, "B V E"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
