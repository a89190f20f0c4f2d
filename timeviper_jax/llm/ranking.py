"""How much each token of a row matters to what is asked, for TransV to keep the best.

A sample's tokens are ranked by the attention that its last instruction token pays them,
by an attention layer's own q and k, on the raw residual: before the block's norm, as
the published weights mean it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from timeviper_jax import sharding
from timeviper_jax.data.examples import Role
from timeviper_jax.llm.rows import read_tokens
from timeviper_jax.llm.stream import Stream, take


def rank(
    block: nnx.Module, stream: Stream, *, path: str, dtype: str
) -> Float[Array, "B T"]:
    """The score of each token; no gradient flows through it.

    Args:
      block: One attention block.
      stream: What enters it.
      path: Of the stack of parameters that the block is of.
      dtype: What they are cast to where they are cut over devices.
    """
    graph, params = nnx.split(block)
    layer = nnx.merge(graph, jax.lax.stop_gradient(params))
    x = jax.lax.stop_gradient(stream.x)
    at = ranking_position(stream)
    counts = take(stream.layout.counts(), at)
    args = x, read_tokens(x, at), counts, _visible(stream, at)
    if sharding.active_mesh() is None:
        return _scores(layer, *args)
    specs = (sharding.TOKENS, sharding.BATCH, sharding.BATCH)
    return sharding.on_shards(
        functools.partial(_scores_of_all, axis=sharding.context_axis()),
        {path: layer},
        *args,
        in_specs=(*specs, P(*sharding.BATCH, None, "context")),
        out_specs=sharding.BATCH,
        dtype=dtype,
        stacked=True,
    )


def _scores(
    layer: nnx.Module,
    x: Float[Array, "B T D"],
    asking: Float[Array, "B Z D"],
    counts: Int[Array, "B Z"],
    visible: Bool[Array, "B Z T"],
    *,
    axis: str | None = None,
) -> Float[Array, "B T"]:
    """Attention of the `asking` tokens, which see `counts` tokens, to those of x."""
    q, k = layer.mixer.query(asking, counts), layer.mixer.k(x)
    return attention_scores(q, k, visible, axis=axis)


def _scores_of_all(*args: Any, axis: str | None) -> Float[Array, "B T"]:
    """`_scores` of whole rows, by all heads, on each device."""
    scores = jax.lax.pmean(_scores(*args, axis=axis), "tensor")
    if axis is None:
        return scores
    return jax.lax.all_gather(scores, axis, axis=1, tiled=True)


def _visible(stream: Stream, at: Int[Array, "B Z"]) -> Bool[Array, "B Z T"]:
    """The tokens of its own sample up to each ranking token."""
    T = stream.segment_ids.shape[1]
    ids = jnp.arange(stream.num_segments + 1)[None, :, None]
    mine = (stream.segment_ids[:, None, :] == ids) & (ids > 0)
    return mine & (jnp.arange(T) <= at[..., None])


def ranking_position(stream: Stream) -> Int[Array, "B Z"]:
    """Where in the row each sample's ranking token stands: its last instruction.

    A sample without instruction ranks by the last token before its answer, which is
    what it knows when it is asked.
    """
    T = stream.roles.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)
    order = jnp.where(stream.roles == Role.ANSWER, -1, index)
    order = jnp.where(stream.roles == Role.INSTRUCTION, index + T, order)
    ids = jnp.arange(stream.num_segments + 1)[:, None]
    mine = stream.segment_ids[:, None, :] == ids  # B Z T
    return jnp.argmax(jnp.where(mine, order[:, None, :], -1), axis=-1)


def attention_scores(
    q: Float[Array, "B Z N H"],
    k: Float[Array, "B T K H"],
    visible: Bool[Array, "B Z T"],
    *,
    axis: str | None = None,
) -> Float[Array, "B T"]:
    """Attention that each token gets from its sample's ranking query, over heads.

    Softmax over `visible` keys in float32, mean over heads; Z counts a row's samples.
    With an `axis`, T is a shard of all keys along this axis of the mesh.
    """
    B, Z, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, Z, K, N // K, H)
    logits = jnp.einsum("BZKRH,BTKH->BZKRT", q, k, preferred_element_type=jnp.float32)
    mask = visible[:, :, None, None, :]
    logits = jnp.where(mask, logits * H**-0.5, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    peak = jax.lax.pmax(peak, axis) if axis else peak
    # A sample that is not there sees nothing; its weights are NaN, and are not used.
    weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jax.lax.psum(total, axis) if axis else total
    weights = jnp.where(mask, weights / total, 0.0)
    return jnp.sum(jnp.mean(weights, axis=(2, 3)), axis=1)
