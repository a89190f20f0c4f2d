"""Attention a tile at a time: an online softmax over blocks of keys, in plain XLA.

No more than a block of queries meets a block of keys at once, and pairs that a causal
mask or the end of a cache rules out are not visited: memory is linear in length, and
one compiled program costs what is in a cache, not its capacity. The backward pass
(algorithm 4 of https://arxiv.org/abs/2205.14135) computes the tiles' weights again.
"""

import functools
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.attention.mask import visible


class Rules(NamedTuple):
    """Which keys a query sees, beside causality; see `api.attention`."""

    layer: Int[Array, ""] | int
    q_segment_ids: Int[Array, "J B Q"] | None
    kv_segment_ids: Int[Array, "B S"] | None
    kv_mask: Bool[Array, "B S"] | None
    q_offset: Int[Array, ""] | int
    kv_length: Int[Array, ""] | int


class Settings(NamedTuple):
    """What is known when a program is compiled."""

    causal: bool
    scale: float
    block_kv: int


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "*A B S K H"],
    v: Float[Array, "*A B S K H"],
    *,
    layer: Int[Array, ""] | int | None = None,
    **rules,
) -> Float[Array, "B T N H"]:
    """See `api.attention`."""
    if layer is None:
        k, v, layer = _by_head(k), _by_head(v), 0
    if not q.shape[1] or not k.shape[3]:
        return jnp.zeros_like(q)
    rules, settings, block_q = _settled(q, k, layer=layer, **rules)
    out = _attend(_rows(q, k.shape[2], block_q), k, v, rules, settings)
    return _by_token(out, q.shape[1])


def part(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    **rules,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """What some of the keys give, and the logarithm of the sum of their weights."""
    k, v = _by_head(k), _by_head(v)
    rules, settings, block_q = _settled(q, k, layer=0, **rules)
    rows = _rows(q, k.shape[2], block_q)
    out, (*_, log_total) = _forward(rows, k, v, rules, settings)
    T = q.shape[1]
    return _by_token(out, T), _by_token(log_total, T)[..., 0]


def part_gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    log_total: Float[Array, "B T N"],
    dout: Float[Array, "B T N H"],
    **rules,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of q, k, v through these keys; `out`, `log_total` are of all keys."""
    k, v = _by_head(k), _by_head(v)
    rules, settings, block_q = _settled(q, k, layer=0, **rules)
    rows = functools.partial(_rows, K=k.shape[2], block_q=block_q)
    residuals = rows(q), k, v, rules, rows(out), rows(log_total[..., None])
    dq, dk, dv, _ = _backward(settings, residuals, rows(dout))
    return _by_token(dq, q.shape[1]), *(jnp.swapaxes(z[0], 1, 2) for z in (dk, dv))


def _settled(
    q: Float[Array, "B T N H"],
    k: Float[Array, "A B K S H"],
    *,
    layer: Int[Array, ""] | int,
    causal: bool,
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    kv_mask: Bool[Array, "B S"] | None,
    q_offset: Int[Array, ""] | int,
    kv_length: Int[Array, ""] | int,
    scale: float,
    block_q: int = 128,
    block_kv: int = 512,
) -> tuple[Rules, Settings, int]:
    S = k.shape[3]
    rules = Rules(
        layer=layer,
        q_segment_ids=_blocks(q_segment_ids, block_q),
        kv_segment_ids=kv_segment_ids,
        kv_mask=kv_mask,
        q_offset=q_offset,
        kv_length=jnp.minimum(kv_length, S),
    )
    return rules, Settings(causal, scale, min(block_kv, S)), block_q


def _by_head(z: Float[Array, "B S K H"]) -> Float[Array, "1 B K S H"]:
    """As caches lie: the tiles of a head are matrices, which products want."""
    return jnp.swapaxes(z, 1, 2)[None]


def _rows(
    z: Float[Array, "B T N X"], K: int, block_q: int
) -> Float[Array, "J B K r Q X"]:
    """Blocks of queries; `r` counts the query heads that share a key head."""
    rows = _blocks(einops.rearrange(z, "B T (K r) X -> B T K r X", K=K), block_q)
    return einops.rearrange(rows, "J B Q K r X -> J B K r Q X")


def _by_token(z: Float[Array, "J B K r Q X"], T: int) -> Float[Array, "B T N X"]:
    return einops.rearrange(z, "J B K r Q X -> B (J Q) (K r) X")[:, :T]


def _blocks(z: Shaped[Array, "B T *rest"] | None, size: int):
    """Cuts the tokens into blocks, the last one padded; blocks lead."""
    if z is None:
        return None
    size = min(size, z.shape[1])
    z = jnp.pad(z, [(0, 0), (0, -z.shape[1] % size)] + [(0, 0)] * (z.ndim - 2))
    return einops.rearrange(z, "B (J Q) ... -> J B Q ...", Q=size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, rules: Rules, settings: Settings):
    return _forward(q, k, v, rules, settings)[0]


class _Keys(NamedTuple):
    """A block of a cache, where it lies: a cache is never copied as a whole."""

    start: Int[Array, ""]
    first: Int[Array, ""]  # What stands before it belongs to the block before.
    size: int

    @classmethod
    def block(cls, i, size: int, S: int) -> "_Keys":
        """The last block ends with the cache and shares keys with the one before."""
        return cls(jnp.minimum(i * size, S - size), i * size, size)

    def of(self, z: Shaped[Array, "B S"] | None):
        if z is None:
            return None
        return jax.lax.dynamic_slice_in_dim(z, self.start, self.size, axis=1)

    def read(self, z: Float[Array, "A B K S H"], layer) -> Float[Array, "B K U H"]:
        _, B, K, _, H = z.shape
        return jax.lax.dynamic_slice(z, self._at(layer), (1, B, K, self.size, H))[0]

    def add(
        self, z: Float[Array, "A B K S H"], layer, new: Float[Array, "B U K H"]
    ) -> Float[Array, "A B K S H"]:
        new = (self.read(z, layer) + jnp.swapaxes(new, 1, 2))[None]
        return jax.lax.dynamic_update_slice(z, new, self._at(layer))

    def _at(self, layer):
        return layer, 0, 0, self.start, 0


def _logits(q_block, k_block, j, keys: _Keys, rules: Rules, settings: Settings):
    """Logits of the block j of queries with a block of keys, in float32."""
    logits = _einsum("BKrQH,BKUH->BKrQU", q_block, k_block)
    ids = rules.q_segment_ids
    Q = q_block.shape[-2]
    positions = keys.start + jnp.arange(keys.size)
    mask = (positions >= keys.first) & visible(
        rules.q_offset + j * Q + jnp.arange(Q),
        positions,
        causal=settings.causal,
        q_segment_ids=None if ids is None else ids[j],
        kv_segment_ids=keys.of(rules.kv_segment_ids),
        kv_mask=keys.of(rules.kv_mask),
        kv_length=rules.kv_length,
    )
    return jnp.where(mask, logits * settings.scale, -jnp.inf)


def _forward(
    q: Float[Array, "J B K r Q H"],
    k: Float[Array, "A B K S H"],
    v: Float[Array, "A B K S H"],
    rules: Rules,
    settings: Settings,
):
    """The outputs, and what the backward pass needs."""
    Q, U, S = q.shape[-2], settings.block_kv, k.shape[3]

    def one_row(_, inputs):
        j, q_block = inputs

        def one_tile(i, carry):
            out, peak, total = carry
            keys = _Keys.block(i, U, S)
            k_block, v_block = (keys.read(z, rules.layer) for z in (k, v))
            logits = _logits(q_block, k_block, j, keys, rules, settings)
            new_peak = jnp.maximum(peak, logits.max(-1, keepdims=True))
            weights = jnp.exp(logits - new_peak)
            read = _einsum("BKrQU,BKUH->BKrQH", weights.astype(v.dtype), v_block)
            keep = jnp.exp(peak - new_peak)
            total = keep * total + _sum_last(weights)
            return keep * out + read, new_peak, total

        end = rules.kv_length
        if settings.causal:
            end = jnp.minimum(end, rules.q_offset + (j + 1) * Q)
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        out = jnp.zeros(q_block.shape, dtype)
        total = jnp.zeros_like(out[..., :1])
        # Finite where nothing is seen, so that exp(-inf - peak) is 0 and not NaN.
        peak = jnp.full_like(total, jnp.finfo(dtype).min)
        out, peak, total = jax.lax.fori_loop(
            0, -(-end // U), one_tile, (out, peak, total)
        )
        total = jnp.where(total == 0, 1, total)
        return None, ((out / total).astype(q.dtype), peak + jnp.log(total))

    _, (out, log_total) = jax.lax.scan(one_row, None, (jnp.arange(len(q)), q))
    return out, (q, k, v, rules, out, log_total)


def _backward(settings: Settings, residuals, dout):
    """Blocks of keys in turn, each with the blocks of queries that may see it."""
    q, k, v, rules, out, log_total = residuals
    Q, U, S = q.shape[-2], settings.block_kv, k.shape[3]
    dtype = log_total.dtype
    through = _sum_last(dout.astype(dtype) * out.astype(dtype))

    def one_column(i, carry):
        dq, dk, dv = carry
        keys = _Keys.block(i, U, S)
        k_block, v_block = (keys.read(z, rules.layer) for z in (k, v))

        def one_tile(j, carry):
            dq, dk, dv = carry
            logits = _logits(q[j], k_block, j, keys, rules, settings)
            weights = jnp.exp(logits - log_total[j])
            dv += _einsum("BKrQU,BKrQH->BUKH", weights.astype(v.dtype), dout[j])
            dweights = _einsum("BKrQH,BKUH->BKrQU", dout[j], v_block)
            dlogits = weights * (dweights - through[j]) * settings.scale
            dlogits = dlogits.astype(q.dtype)
            dk += _einsum("BKrQU,BKrQH->BUKH", dlogits, q[j])
            own = _einsum("BKrQU,BKUH->BKrQH", dlogits, k_block)
            return dq.at[j].add(own), dk, dv

        first = 0
        if settings.causal:
            first = jnp.maximum(keys.start - rules.q_offset, 0) // Q
        # By token: by head, XLA on CPU takes 1.6 times as long for these products.
        zero = jnp.zeros(jnp.swapaxes(k_block, 1, 2).shape, dtype)
        dq, own_dk, own_dv = jax.lax.fori_loop(
            first, len(q), one_tile, (dq, zero, zero)
        )
        dk, dv = (
            keys.add(z, rules.layer, own) for z, own in ((dk, own_dk), (dv, own_dv))
        )
        return dq, dk, dv

    zeros = [jnp.zeros(z.shape, dtype) for z in (q, k, v)]
    columns = -(-rules.kv_length // U)
    dq, dk, dv = jax.lax.fori_loop(0, columns, one_column, tuple(zeros))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _einsum(pattern: str, *operands):
    """Accumulates in float32 at least."""
    dtype = jnp.promote_types(operands[0].dtype, jnp.float32)
    return jnp.einsum(pattern, *operands, preferred_element_type=dtype)


def _sum_last(x: Float[Array, "*B X"]) -> Float[Array, "*B 1"]:
    """A sum as a matmul, which XLA on CPU runs several times faster than its own."""
    return jnp.einsum("...X,X->...", x, jnp.ones(x.shape[-1], x.dtype))[..., None]
