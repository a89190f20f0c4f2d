"""Grouped-query attention, cached or not, with or without positions.

Among Mamba layers nothing tells a layer where a token stands: order comes from them
and from the causal mask. A plain transformer turns queries and keys by it (`rope.py`).
A token's position is how many tokens of its sample this layer has seen before it, so
that it follows from what is packed, cached or dropped, and is never passed around.
"""

import dataclasses
import functools
import math

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import attention
from pallas_kernels.attention.context_parallel import attention_sharded
from pallas_kernels.platform import target_platform
from timeviper_jax.layers.cache import KVCache, Slots
from timeviper_jax.layers.layout import Layout
from timeviper_jax.layers.rope import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of one attention layer.

    `log_base` > 0 multiplies the logits by log(n) / log(log_base), where n is the
    number of tokens a query sees, so that attention stays as sharp on sequences
    longer than those trained on (arXiv 2202.12172, section 5); 0 leaves them alone.
    `rope_theta` > 0 is the base of rotary positions; 0 has none. `bias` is that of
    queries, keys and values; the output never has one.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    log_base: float = 0.0
    rope_theta: float = 0.0
    bias: bool = False
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of"
                f" num_kv_heads={self.num_kv_heads}."
            )
        if self.rope_theta and self.head_dim % 2:
            raise ValueError(
                f"Rotary positions turn pairs of channels; head_dim={self.head_dim}"
                " must be even."
            )


def projections(cfg: AttentionConfig, rngs: nnx.Rngs) -> dict[str, nnx.Einsum]:
    """The four matrices of grouped-query attention, by name."""
    D, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def make(einsum, shape, std, bias=None):
        return nnx.Einsum(
            einsum,
            shape,
            bias,
            kernel_init=nnx.initializers.normal(std),
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            rngs=rngs,
        )

    bias = lambda heads: (heads, H) if cfg.bias else None
    return {
        "q": make("BTD,DNH->BTNH", (D, N, H), cfg.init_std, bias(N)),
        "k": make("BSD,DKH->BSKH", (D, K, H), cfg.init_std, bias(K)),
        "v": make("BSD,DKH->BSKH", (D, K, H), cfg.init_std, bias(K)),
        "out": make("BTNH,NHD->BTD", (N, H, D), cfg.out_std),
    }


def scale_queries(
    q: Float[Array, "B T N H"], counts: Int[Array, "B T"], log_base: float
) -> Float[Array, "B T N H"]:
    """Queries times log(count) / log(log_base), where a count is of what each sees."""
    if not log_base:
        return q
    n = jnp.maximum(counts, 2).astype(jnp.float32)
    factor = jnp.log(n) / math.log(log_base)
    return q * factor[..., None, None].astype(q.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped keys and values."""

    def __init__(self, cfg: AttentionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        for name, module in projections(cfg, rngs).items():
            setattr(self, name, module)

    def query(
        self, x: Float[Array, "B T D"], counts: Int[Array, "B T"]
    ) -> Float[Array, "B T N H"]:
        """Queries, scaled by how many tokens (`counts`) each of them sees."""
        return scale_queries(self.q(x), counts, self.cfg.log_base)

    def project(
        self, x: Float[Array, "B T D"], counts: Int[Array, "B T"]
    ) -> tuple[
        Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]
    ]:
        """Queries, keys and values of tokens that see `counts` tokens each."""
        q, k, v = self.query(x, counts), self.k(x), self.v(x)
        if self.cfg.rope_theta:
            q, k = (rotate(z, counts - 1, self.cfg.rope_theta) for z in (q, k))
        return q, k, v

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layout: Layout,
        cache: KVCache | None = None,
        slots: Slots | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends to the tokens before, in this call and in the cache.

        The cache is that of a whole stack of layers, of which this one is `index`:
        it is written and read where it lies, because a layer's part is too large to
        be copied for each token. `slots` are those of the cache before this call.
        """
        counts = layout.counts()
        if cache is None:
            q, k, v = self.project(x, counts)
            ids = layout.boundaries
            mask = None if layout.packed else layout.valid
            ring = functools.partial(attention_sharded, axis_name=layout.axis)
            y = (ring if layout.axis else attention)(
                q,
                k,
                v,
                causal=True,
                q_segment_ids=ids,
                kv_segment_ids=ids,
                kv_mask=mask,
            )
            return self.out(y), None
        before = slots.lengths if layout.before is None else layout.before
        q, k, v = self.project(x, before[:, None] + counts)
        cache = KVCache(
            k=_write(cache.k, k, index, slots.used),
            v=_write(cache.v, v, index, slots.used),
        )
        after = slots.write(layout.valid)
        y = attention(
            q,
            cache.k,
            cache.v,
            causal=True,
            layer=index,
            kv_mask=after.valid,
            q_offset=slots.used,
            kv_length=after.used,
        )
        return self.out(y), cache


def _write(
    slots: Float[Array, "A B K C H"],
    new: Float[Array, "B T K H"],
    index: Int[Array, ""] | int,
    at: Int[Array, ""],
) -> Float[Array, "A B K C H"]:
    new = jnp.swapaxes(new, 1, 2)[None].astype(slots.dtype)
    tiled = target_platform() == "tpu" and slots.shape[3] % _TILE == 0
    if new.shape[3] == 1 and tiled:
        return _write_one(slots, new, index, at)
    return jax.lax.dynamic_update_slice(slots, new, (index, 0, 0, at, 0))


# Tokens in a tile of a TPU's memory.
_TILE = 8


def _write_one(
    slots: Float[Array, "A B K C H"],
    new: Float[Array, "1 B K 1 H"],
    index: Int[Array, ""] | int,
    at: Int[Array, ""],
) -> Float[Array, "A B K C H"]:
    """Writes the tile that the token is in.

    For a token within a tile XLA on TPU would turn the caches around, as a second copy,
    so that each token is a tile. XLA on CPU would copy the caches for each tile.
    """
    tiles = einops.rearrange(slots, "A B K (c t) H -> A B K c t H", t=_TILE)
    start = index, 0, 0, at // _TILE, 0, 0
    size = (1, *new.shape[1:3], 1, _TILE, new.shape[4])
    old = jax.lax.dynamic_slice(tiles, start, size)
    here = (jnp.arange(_TILE) == at % _TILE)[:, None]
    tile = jnp.where(here, new[:, :, :, None], old)
    return jax.lax.dynamic_update_slice(tiles, tile, start).reshape(slots.shape)
