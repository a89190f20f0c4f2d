"""Grouped-query attention without positions, cached or not.

Nothing tells the layer where a token stands: order comes from the Mamba layers
around it and from the causal mask.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import attention
from timeviper_jax.layers.cache import KVCache, Slots
from timeviper_jax.layers.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of one attention layer.

    `log_base` > 0 multiplies the logits by log(n) / log(log_base), where n is the
    number of tokens a query sees, so that attention stays as sharp on sequences
    longer than those trained on (arXiv 2202.12172, section 5); 0 leaves them alone.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    log_base: float = 0.0
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


def projections(cfg: AttentionConfig, rngs: nnx.Rngs) -> dict[str, nnx.Einsum]:
    """The four bias-free matrices of grouped-query attention, by name."""
    D, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    options = dict(
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        rngs=rngs,
    )
    normal = nnx.initializers.normal(cfg.init_std)
    return {
        "q": nnx.Einsum("BTD,DNH->BTNH", (D, N, H), kernel_init=normal, **options),
        "k": nnx.Einsum("BSD,DKH->BSKH", (D, K, H), kernel_init=normal, **options),
        "v": nnx.Einsum("BSD,DKH->BSKH", (D, K, H), kernel_init=normal, **options),
        "out": nnx.Einsum(
            "BTNH,NHD->BTD",
            (N, H, D),
            kernel_init=nnx.initializers.normal(cfg.out_std),
            **options,
        ),
    }


class Attention(nnx.Module):
    """Causal self-attention with grouped keys and values (NoPE)."""

    def __init__(self, cfg: AttentionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        for name, module in projections(cfg, rngs).items():
            setattr(self, name, module)

    def query(
        self, x: Float[Array, "B T D"], counts: Int[Array, "B T"]
    ) -> Float[Array, "B T N H"]:
        """Queries, scaled by how many tokens (`counts`) each of them sees."""
        q = self.q(x)
        if not self.cfg.log_base:
            return q
        n = jnp.maximum(counts, 2).astype(jnp.float32)
        factor = jnp.log(n) / math.log(self.cfg.log_base)
        return q * factor[..., None, None].astype(q.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layout: Layout,
        cache: KVCache | None = None,
        slots: Slots | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends to the tokens before, in this call and in the cache.

        `slots` are those of the cache before this call.
        """
        if cache is None:
            q, k, v = self.query(x, layout.counts()), self.k(x), self.v(x)
            ids = layout.boundaries
            mask = None if layout.packed else layout.valid
            y = attention(
                q,
                k,
                v,
                causal=True,
                q_segment_ids=ids,
                kv_segment_ids=ids,
                kv_mask=mask,
            )
            return self.out(y), None
        seen = jnp.sum(slots.valid, axis=1, dtype=jnp.int32)[:, None]
        q, k, v = self.query(x, seen + layout.counts()), self.k(x), self.v(x)
        cache = KVCache(
            k=_write(cache.k, k, slots.used), v=_write(cache.v, v, slots.used)
        )
        after = slots.write(layout.valid)
        y = attention(
            q,
            cache.k,
            cache.v,
            causal=True,
            kv_mask=after.valid,
            q_offset=slots.used,
            kv_length=after.used,
        )
        return self.out(y), cache


def _write(
    slots: Float[Array, "B C K H"], new: Float[Array, "B T K H"], at: Int[Array, ""]
) -> Float[Array, "B C K H"]:
    zero = jnp.zeros_like(at)
    return jax.lax.dynamic_update_slice(
        slots, new.astype(slots.dtype), (zero, at, zero, zero)
    )
