"""Tokens that change places in rows which may be cut over devices.

Which tokens go where is known everywhere (a few integers a token); the tokens
themselves never stand on one device all together. Without a mesh these are indexing.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from timeviper_jax import sharding
from timeviper_jax.llm.stream import take

# Channels are split as well, so that devices which share tokens each move a part.
_CUT = P(*sharding.TOKENS, "tensor")
_WHOLE = P(*sharding.BATCH, None, "tensor")


def whole_shards(tokens: int) -> int:
    """`tokens`, made more until every shard of a row has as many."""
    shards = sharding.axis_size("context")
    return -(-tokens // shards) * shards


def move_tokens(
    x: Float[Array, "B T D"], index: Int[Array, "B U"]
) -> Float[Array, "B U D"]:
    """`x[b, index[b, u]]`, both sides cut over devices alike."""
    if sharding.active_mesh() is None:
        return take(x, index)
    return _on_shards(_move, (_CUT, sharding.TOKENS), _CUT)(x, index)


def read_tokens(
    x: Float[Array, "B T D"], index: Int[Array, "B U"]
) -> Float[Array, "B U D"]:
    """`x[b, index[b, u]]` of a few tokens, on all devices that share the row."""
    if sharding.active_mesh() is None:
        return take(x, index)
    return _on_shards(_read, (_CUT, sharding.BATCH), _WHOLE)(x, index)


def add_tokens(
    x: Float[Array, "B T D"], index: Int[Array, "B U"], new: Float[Array, "B U D"]
) -> Float[Array, "B T D"]:
    """Adds `new[b, u]` to `x[b, index[b, u]]`; nowhere if that is outside."""
    if sharding.active_mesh() is None:
        return _add(x, index, new)
    return _on_shards(_add_own, (_CUT, sharding.BATCH, _WHOLE), _CUT)(x, index, new)


def _on_shards(run, in_specs, out_specs):
    """`run(*arrays, axis)`, where rows are shards along `axis`, if they are cut."""
    return jax.shard_map(
        functools.partial(run, axis=sharding.context_axis()),
        mesh=sharding.active_mesh(),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


def _move(
    x: Float[Array, "B T D"], index: Int[Array, "B U"], *, axis: str | None
) -> Float[Array, "B U D"]:
    """Shards travel around the ring of devices; each takes what it is to hold."""
    if axis is None:
        return take(x, index)
    here, devices = lax.axis_index(axis), lax.axis_size(axis)
    to_the_next = [(i, (i + 1) % devices) for i in range(devices)]

    def one_shard(carry, distance):
        x, taken = carry
        taken += _own(x, index, (here - distance) % devices)
        return (lax.ppermute(x, axis, to_the_next), taken), None

    taken = jnp.zeros((*index.shape, x.shape[-1]), x.dtype)
    (_, taken), _ = lax.scan(one_shard, (x, taken), jnp.arange(devices))
    return taken


def _read(
    x: Float[Array, "B T D"], index: Int[Array, "B U"], *, axis: str | None
) -> Float[Array, "B U D"]:
    if axis is None:
        return take(x, index)
    return lax.psum(_own(x, index, lax.axis_index(axis)), axis)


def _own(
    x: Float[Array, "B T D"], index: Int[Array, "B U"], shard: Int[Array, ""]
) -> Float[Array, "B U D"]:
    """The tokens that stand in this shard, which is x; zeros for the others."""
    T = x.shape[1]
    local = index - shard * T
    tokens = take(x, jnp.clip(local, 0, T - 1))
    return jnp.where(((local >= 0) & (local < T))[..., None], tokens, 0)


def _add_own(
    x: Float[Array, "B T D"],
    index: Int[Array, "B U"],
    new: Float[Array, "B U D"],
    *,
    axis: str | None,
) -> Float[Array, "B T D"]:
    if axis is None:
        return _add(x, index, new)
    T = x.shape[1]
    local = index - lax.axis_index(axis) * T
    # A negative index would count from the end.
    return _add(x, jnp.where(local < 0, T, local), new)


def _add(
    x: Float[Array, "B T D"], index: Int[Array, "B U"], new: Float[Array, "B U D"]
) -> Float[Array, "B T D"]:
    put = lambda row, i, tokens: row.at[i].add(tokens, mode="drop")
    return jax.vmap(put)(x, index, new)
