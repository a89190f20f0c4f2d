"""Attention on TPU: JAX's splash kernels, told at run time which tiles to visit.

Splash walks tiles of queries and keys by tables in scalar memory. The masks that come
with it make these tables in NumPy, for one offset, in time quadratic in length. Here
XLA computes them from positions and segments: one program serves every chunk of a
prefill, and no tile is fetched that lies in the future, behind the end of a cache, or
where no segment of the queries meets one of the keys. On CPU the kernels are
interpreted, for tests.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_info,
)
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import blocks
from pallas_kernels.platform import require_local, target_platform

_LOWEST, _HIGHEST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
_HIDDEN = _LOWEST  # The segment of keys that no query sees.
# A logit without a value that every query sees: below any real one, far above the
# kernel's own mask. A query that sees no key gives it all its weight and reads zeros.
_NOTHING = -1e30


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    **rules,
) -> Float[Array, "B T N H"]:
    """See `api.attention`; q, k and v all in bfloat16, or all in float32.

    Queries are scaled before the kernel sees them: in bfloat16 they are rounded again.
    """
    _check(q, k, v)
    call = _arranged(q, k, v, **rules)
    out = call.each_row(call.kernel, *call.arrays)
    return _by_token(out, q.shape[1])


def part(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    **rules,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """What some of the keys give, and the logarithm of the sum of their weights."""
    _check(q, k, v)
    call = _arranged(q, k, v, save_residuals=True, **rules)
    out, (log_total,) = call.each_row(call.kernel, *call.arrays)
    return _by_token(out, q.shape[1]), _by_token(log_total, q.shape[1])


def part_gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    log_total: Float[Array, "B T N"],
    dout: Float[Array, "B T N H"],
    **rules,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of q, k and v through these keys; `out`, `log_total` are of all keys.

    The kernels' own backward pass cannot be reached but by a name of JAX's own: it is
    given to no caller apart from the forward pass.
    """
    call = _arranged(q, k, v, **rules)
    behind = call.arrays[0].shape[2] - q.shape[1]
    o, log_total, do = (
        _pad(jnp.swapaxes(z, 1, 2), behind, axis=2)
        for z in (out.astype(q.dtype), log_total, dout.astype(q.dtype))
    )
    options = call.kernel.kwargs

    def pull(q, k, v, ids, o, log_total, do, sinks):
        tables = call.kernel.dq_mask_info, call.kernel.dkv_mask_info
        residuals = q, k, v, ids, sinks, o, log_total, *tables
        static = [options[name] for name in _BACKWARD_OPTIONS]
        return splash._splash_attention_bwd(*static, residuals, do)[3:6]

    dq, dk, dv = call.each_row(pull, *call.arrays, o, log_total, do)
    scale = jnp.asarray(rules["scale"], dq.dtype)
    return (
        _by_token(dq, q.shape[1]) * scale,
        _by_token(dk, k.shape[1]),
        _by_token(dv, k.shape[1]),
    )


_BACKWARD_OPTIONS = (
    "save_residuals",
    "mask_value",
    "is_mqa",
    "block_sizes",
    "residual_checkpoint_name",
    "mask_function",
    "attn_logits_soft_cap",
    "interpret",
)


class _Call(NamedTuple):
    """Arrays as the kernels hold them, by head, padded to whole blocks."""

    kernel: splash.SplashAttentionKernel
    arrays: tuple[Array, Array, Array, splash.SegmentIds | None]

    def each_row(self, run: Callable, q: Array, *arrays):
        nothing = jnp.full(q.shape[1], _NOTHING)
        return jax.vmap(functools.partial(run, sinks=nothing))(q, *arrays)


def _arranged(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    kv_mask: Bool[Array, "B S"] | None,
    q_offset: Int[Array, ""] | int,
    kv_length: Int[Array, ""] | int,
    scale: float,
    save_residuals: bool = False,
    sizes: blocks.Blocks | None = None,
) -> _Call:
    (B, T, _, H), S = q.shape, k.shape[1]
    sizes = sizes or blocks.choose(T, S, H)
    behind_q, behind_kv = -T % sizes.multiple_q, -S % sizes.multiple_kv
    positions = q_offset + jnp.arange(T + behind_q, dtype=jnp.int32)
    q_ids, kv_ids = _segments(
        *(B, T, S, q_segment_ids, kv_segment_ids, kv_mask, kv_length)
    )
    # What stands behind the arrays is nobody's: ids that no block's range takes in.
    q_ids = _pad(q_ids, behind_q, _HIGHEST)
    kv_ids = _pad(kv_ids, behind_kv, _HIDDEN)
    kernel = _kernel(q_ids, kv_ids, positions, causal, sizes, save_residuals)
    ids = splash.SegmentIds(q_ids, kv_ids)
    everything = q_segment_ids is None and kv_mask is None
    if everything and _nothing_behind(causal, q_offset, kv_length, T, S, behind_kv):
        ids = None
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    arrays = (
        _pad(jnp.swapaxes(z, 1, 2), behind, axis=2)
        for z, behind in ((q, behind_q), (k, behind_kv), (v, behind_kv))
    )
    return _Call(kernel, (*arrays, ids))


def _by_token(z: Float[Array, "B N T *rest"], T: int) -> Float[Array, "B T2 N *rest"]:
    """Without what was padded."""
    return jnp.swapaxes(z[:, :, :T], 1, 2)


def _check(q, k, v) -> None:
    """Raises NotImplementedError where the kernels don't take the arrays; says why."""
    platform = target_platform()
    if platform not in ("tpu", "cpu"):
        raise NotImplementedError(
            f'"splash_tpu" runs on TPU, and interpreted on CPU, not on {platform!r}.'
        )
    require_local("splash_tpu")
    dtypes = {z.dtype.name for z in (q, k, v)}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        raise NotImplementedError(
            f"q, k and v must all be bfloat16 or all float32, not {sorted(dtypes)}."
        )
    if not q.size or not k.size:
        raise NotImplementedError(f"There is nothing to read: q {q.shape} k {k.shape}.")


def _segments(B, T, S, q_segment_ids, kv_segment_ids, kv_mask, kv_length):
    """Ids of queries and of keys; a key that no query sees is of the segment hidden."""
    if q_segment_ids is None:
        q_segment_ids, kv_segment_ids = (jnp.zeros((B, X), jnp.int32) for X in (T, S))
    exists = jnp.arange(S) < kv_length
    if kv_mask is not None:
        exists = exists & kv_mask
    kv_ids = jnp.where(exists, kv_segment_ids.astype(jnp.int32), _HIDDEN)
    return q_segment_ids.astype(jnp.int32), kv_ids


def _nothing_behind(causal, q_offset, kv_length, T, S, behind_kv) -> bool:
    """Whether no query sees past the keys that exist, whatever their ids say.

    Comparing ids costs time in every tile; only sizes known now can spare it.
    """
    if not isinstance(kv_length, int):
        return False
    if causal and isinstance(q_offset, int) and q_offset + T <= min(kv_length, S):
        return True
    return kv_length >= S and not behind_kv


def _pad(z: Array, behind: int, value: int = 0, axis: int = 1) -> Array:
    widths = [(0, behind if i == axis else 0) for i in range(z.ndim)]
    return jnp.pad(z, widths, constant_values=value)


def _kernel(
    q_ids: Int[Array, "B T"],
    kv_ids: Int[Array, "B S"],
    positions: Int[Array, "T"],
    causal: bool,
    sizes: blocks.Blocks,
    save_residuals: bool,
) -> splash.SplashAttentionKernel:
    """Forward and backward kernels, with the tables of the tiles that each visits."""

    def tables(block_q: int, block_kv: int, axis: int) -> mask_info.MaskInfo:
        tiles = _tiles(q_ids, kv_ids, positions, causal, block_q, block_kv)
        return mask_info.MaskInfo(
            data_next=_fetched(tiles, axis)[None],
            mask_next=None,
            block_mask=tiles[None].astype(jnp.int8),
            partial_mask_blocks=None,
            q_sequence=positions if causal else None,
        )

    return splash.SplashAttentionKernel(
        tables(*sizes.forward, axis=1),
        tables(*sizes.dq, axis=1),
        tables(*sizes.dkv, axis=0),
        block_sizes=sizes.of_splash(),
        is_mqa=False,
        save_residuals=save_residuals,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_not_after if causal else None,
        interpret=target_platform() == "cpu",
    )


def _not_after(q_positions, kv_positions):
    return kv_positions <= q_positions


def _tiles(
    q_ids: Int[Array, "B T"],
    kv_ids: Int[Array, "B S"],
    positions: Int[Array, "T"],
    causal: bool,
    block_q: int,
    block_kv: int,
) -> Bool[Array, "I J"]:
    """Whether a block I of queries may see a block J of keys, in any row."""
    first_q, last_q = _range(q_ids, q_ids != _HIGHEST, block_q)  # B I
    first_kv, last_kv = _range(kv_ids, kv_ids != _HIDDEN, block_kv)  # B J
    meet = first_q[:, :, None] <= last_kv[:, None]
    meet &= first_kv[:, None] <= last_q[:, :, None]
    tiles = meet.any(0)
    if causal:
        last = positions[block_q - 1 :: block_q]
        tiles &= last[:, None] >= jnp.arange(0, kv_ids.shape[1], block_kv)
    return tiles


def _range(
    ids: Int[Array, "B X"], real: Bool[Array, "B X"], block: int
) -> tuple[Int[Array, "B I"], Int[Array, "B I"]]:
    """The lowest and the highest real id of each block; an empty range if none is."""
    cut = lambda z: einops.rearrange(z, "B (I Q) -> B I Q", Q=block)
    lowest = cut(jnp.where(real, ids, _HIGHEST)).min(-1)
    return lowest, cut(jnp.where(real, ids, _LOWEST)).max(-1)


def _fetched(tiles: Bool[Array, "I J"], axis: int) -> Int[Array, "I J"]:
    """The block that stands in memory at each step of a walk along an axis.

    Where a tile is not visited it is the one before, so that nothing is fetched.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, tiles.shape, axis)
    before = jax.lax.cummax(jnp.where(tiles, index, -1), axis=axis)
    first = jnp.argmax(tiles, axis=axis, keepdims=True)
    fetched = jnp.where(before < 0, first, before)
    # Scalar memory is small.
    return fetched.astype(jnp.int8 if tiles.shape[axis] <= 128 else jnp.int16)
