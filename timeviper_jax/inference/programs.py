"""The compiled parts of inference: few programs, which serve every length.

A program is compiled for the rows and tokens of one call and for the capacity of its
cache. What a stage of TransV keeps and drops does not leave the device for that. Models
that differ only in TransV share all programs, because a stretch of layers does not know
what happens between stretches.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from pallas_kernels.attention import attention
from timeviper_jax.data.examples import Role
from timeviper_jax.inference.memory import DroppedKV
from timeviper_jax.inference.sampling import Decoding, sample
from timeviper_jax.layers.cache import Cache
from timeviper_jax.layers.layout import Layout
from timeviper_jax.llm.stream import take
from timeviper_jax.llm.transv import Transfer
from timeviper_jax.timeviper import TimeViper, TimeViperConfig, with_stages

Layers = tuple[int, int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers being written: `hidden` is the residual from which the next token comes.

    `tokens` are -1 where nothing is written.
    """

    caches: tuple[Cache, ...]  # One for each stretch.
    hidden: Float[Array, "B D"]
    tokens: Int[Array, "B max_tokens"]
    done: Bool[Array, "B"]
    written: Int[Array, ""]
    key: Key[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """Compiled functions of a model's parameters, the first argument of each."""

    init: Callable  # (params, layers, rows, capacity) -> cache
    embed: Callable  # (params, tokens, roles, features, times) -> x
    embed_text: Callable  # (params, tokens) -> x
    run: Callable  # (params, x, segment_ids, cache, layers) -> (x, cache)
    rank: Callable  # (params, x, asking, counts, layer) -> logits of every head
    head: Callable  # (params, hidden) -> logits
    write: Callable  # (params, answers, limit, stretches, decoding) -> answers


def split_transv(model: TimeViper) -> tuple[TimeViperConfig, nnx.State]:
    """The model as if it had no TransV, and its parameters."""
    bare = with_stages(model, ())
    return bare.cfg, nnx.state(bare)


@functools.lru_cache
def programs(cfg: TimeViperConfig) -> Programs:
    """The programs of models of one size; they compile when first called."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: TimeViper(cfg, rngs=nnx.Rngs(0))))
    with_model = lambda f: lambda params, *args: f(nnx.merge(graph, params), *args)
    return Programs(
        init=jax.jit(with_model(_init), static_argnums=(1, 2, 3)),
        embed=jax.jit(with_model(_embed)),
        embed_text=jax.jit(with_model(lambda model, tokens: model.llm.embed(tokens))),
        run=jax.jit(with_model(_run), static_argnums=4, donate_argnums=3),
        rank=jax.jit(with_model(_rank), static_argnums=4),
        head=jax.jit(with_model(_head)),
        write=jax.jit(with_model(_write), static_argnums=(3, 4), donate_argnums=1),
    )


def _init(model: TimeViper, layers: Layers, rows: int, capacity: int) -> Cache:
    return model.llm.init_cache(layers, rows, capacity)


def _embed(
    model: TimeViper,
    tokens: Int[Array, "B T"],
    roles: Int[Array, "B T"],
    features: Float[Array, "B T E"],
    times: Float[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Text and vision in their places; features and times are given for each token."""
    vision = model.project(features[:, :, None], times)[:, :, 0]
    text = model.embed_text(tokens, roles)
    return jnp.where((roles == Role.VISION)[..., None], vision.astype(text.dtype), text)


def _run(
    model: TimeViper,
    x: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"],
    cache: Cache,
    layers: Layers,
) -> tuple[Float[Array, "B T D"], Cache]:
    """A chunk through a stretch of layers, from and to its cache."""
    layout = Layout(segment_ids=segment_ids)
    x, cache, _ = model.llm.run(x, layout, layers, cache)
    return x, cache


def _rank(
    model: TimeViper,
    x: Float[Array, "B T D"],
    asking: Float[Array, "B D"],
    counts: Int[Array, "B"],
    layer: int,
) -> Float[Array, "B N T"]:
    """Attention logits of one query a row, `asking`, which sees `counts` tokens."""
    mixer = model.llm.block(*model.llm.cfg.layers[layer]).mixer
    q, k = mixer.query(asking[:, None], counts[:, None]), mixer.k(x)
    B, _, N, H = q.shape
    q = q.reshape(B, k.shape[2], -1, H)
    logits = jnp.einsum("BKRH,BTKH->BKRT", q, k, preferred_element_type=jnp.float32)
    return logits.reshape(B, N, -1) * H**-0.5


def _head(model: TimeViper, hidden: Float[Array, "B D"]) -> Float[Array, "B vocab"]:
    return model.llm.logits(model.llm.norm(hidden)[:, None])[:, 0]


def _write(
    model: TimeViper,
    answers: Answers,
    limit: Int[Array, ""],
    stretches: tuple[Layers, ...],
    decoding: Decoding,
) -> Answers:
    """Writes on until every row is done or `limit` tokens are written."""
    llm, stops = model.llm, jnp.array(decoding.stop_ids, jnp.int32)

    def unfinished(answers):
        return (answers.written < limit) & ~jnp.all(answers.done)

    def one_token(answers):
        logits = _head(model, answers.hidden)
        key = jax.random.fold_in(answers.key, answers.written)
        token = sample(logits, key, decoding)
        done = answers.done | jnp.any(token[:, None] == stops, axis=1)
        tokens = answers.tokens.at[:, answers.written].set(jnp.where(done, -1, token))
        x, caches = llm.embed(jnp.where(done, 0, token))[:, None], []
        segment_ids = (~done).astype(jnp.int32)[:, None]
        for layers, before in zip(stretches, answers.caches, strict=True):
            x, after = _run(model, x, segment_ids, before, layers)
            caches.append(after)
        return dataclasses.replace(
            answers,
            caches=tuple(caches),
            hidden=x[:, 0],
            tokens=tokens,
            done=done,
            written=answers.written + 1,
        )

    return jax.lax.while_loop(unfinished, one_token, answers)


@jax.jit
def regroup(
    waiting: Float[Array, "B C D"], x: Float[Array, "B C D"], index: Int[Array, "B C"]
) -> Float[Array, "B C D"]:
    """A chunk out of what waits and what is new, counted on from it."""
    return take(jnp.concatenate([waiting, x], axis=1), index)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def drop(
    graph: nnx.GraphDef,
    params: nnx.State,
    x: Float[Array, "B C D"],
    index: Int[Array, "B C"],
    counts: Int[Array, "B"],
    k: Float[Array, "B R K H"],
    v: Float[Array, "B R K H"],
) -> tuple[Float[Array, "B R K H"], Float[Array, "B R K H"]]:
    """Keys and values with those of the tokens at `index` behind the first `counts`.

    All C are written, how few of them there may be; the next ones go over the rest.
    """
    module: Transfer = nnx.merge(graph, params)
    gone = take(x, index)
    put = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    new_k, new_v = module.k(gone).astype(k.dtype), module.v(gone).astype(v.dtype)
    return put(k, new_k, counts), put(v, new_v, counts)


@functools.partial(jax.jit, static_argnums=0)
def transfer(
    graph: nnx.GraphDef,
    params: nnx.State,
    text: Float[Array, "B T D"],
    receives: Bool[Array, "B T"],
    dropped: DroppedKV,
) -> Float[Array, "B T D"]:
    """`text` after its receiving tokens have read what a stage dropped."""
    module: Transfer = nnx.merge(graph, params)
    counts = dropped.counts[:, None]
    read = attention(
        module.query(text, jnp.broadcast_to(counts, receives.shape)),
        dropped.k,
        dropped.v,
        causal=False,
        kv_mask=jnp.arange(dropped.capacity) < counts,
        kv_length=jnp.max(dropped.counts),
    )
    return jnp.where(receives[..., None], module.add(text, read), text)
