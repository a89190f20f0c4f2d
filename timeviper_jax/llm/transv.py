"""TransV: hands what dropped vision tokens know to the instruction tokens.

https://arxiv.org/abs/2511.16595, section 3.3. Deep layers of a hybrid model barely
read the vision tokens; TransV drops most of them part-way through, after letting the
instruction tokens read the ones about to go.

Selection is a pure function of static sizes; the transfer is a small module beside
it; where both happen is config. Every shape is static: a row's capacity decides how
many tokens can stay, masks carry what is really there, so that one compiled program
serves every video that fits.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.attention import attention
from pallas_kernels.attention.context_parallel import attention_to_shards
from timeviper_jax import sharding
from timeviper_jax.data.examples import Role
from timeviper_jax.layers.attention import AttentionConfig, projections, scale_queries
from timeviper_jax.llm.rows import add_tokens, move_tokens, read_tokens, whole_shards
from timeviper_jax.llm.stream import Stream, take, where_true

# Which text a transfer adds to: the first question after the media, or all text from
# there on, answers too, as the PyTorch release trains.
TRANSFER_TO = ("instruction", "all_text")

_LIMIT = 2**21  # Counts below it multiply and divide exactly in 32 bits.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One thinning of the vision tokens, before block `layer` runs.

    `keep` is a share of the sample's original count. `select` is "uniform" over time
    or by "attention" of the last instruction token. Without `transfer` the dropped
    tokens are simply gone.
    """

    layer: int
    keep: float
    select: Literal["uniform", "attention"] = "uniform"
    transfer: bool = True
    transfer_to: str = "instruction"

    def __post_init__(self):
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep} is a share: use 0 to 1.")
        if self.select not in ("uniform", "attention"):
            raise ValueError(f"select={self.select!r} is not uniform or attention.")
        if self.transfer_to not in TRANSFER_TO:
            raise ValueError(
                f"transfer_to={self.transfer_to!r} is not in {TRANSFER_TO}."
            )


def check_stages(stages: tuple[Stage, ...], pattern: str) -> None:
    """Raises where stages cannot run in this order on this stack of layers."""
    for stage in stages:
        if not 0 <= stage.layer < len(pattern):
            raise ValueError(
                f"TransV at layer {stage.layer}, but the layers are 0 to"
                f" {len(pattern) - 1}."
            )
        if stage.select == "attention" and pattern[stage.layer] != "*":
            layers = [i for i, kind in enumerate(pattern) if kind == "*"]
            raise ValueError(
                f"TransV cannot rank by attention at layer {stage.layer}, which is"
                f" {pattern[stage.layer]!r}; attention layers are {layers}."
            )
    for before, after in zip(stages, stages[1:], strict=False):
        if after.layer <= before.layer or after.keep > before.keep:
            raise ValueError(
                f"TransV keeps {before.keep} at layer {before.layer}, then"
                f" {after.keep} at layer {after.layer}; layers must grow and"
                " shares must not."
            )


@functools.lru_cache
def kept_counts(keep: float, capacity: int) -> np.ndarray:
    """`int(n * keep)` in float64 for every n up to `capacity`."""
    if capacity >= _LIMIT:
        raise ValueError(f"{capacity} vision tokens in a row; at most {_LIMIT - 1}.")
    return (np.arange(capacity + 1) * keep).astype(np.int32)


def kept_capacity(keep: float, capacity: int, num_segments: int) -> int:
    """The most tokens that samples of a full row can keep together."""
    # Rounding in float64 can favour the parts over the whole, by one.
    return min(capacity, int(capacity * keep) + (num_segments > 1))


def dropped_capacity(before: int, after: int, num_segments: int) -> int:
    """The most tokens a row can lose where its capacity falls from before to after."""
    # What a sample loses is the difference of two rounded counts.
    return min(before, before - after + num_segments)


def _multiply_divide(
    i: UInt32[Array, "*B"], r: UInt32[Array, "*B"], m: UInt32[Array, "*B"]
) -> tuple[UInt32[Array, "*B"], UInt32[Array, "*B"]]:
    """floor(i r / m) and the remainder, exactly, for values below `_LIMIT`.

    The product can need 42 bits and JAX has 32, so i is taken ten bits at a time.
    """
    q, rest = r // m, r % m
    high, low = (i // 1024) * rest, (i % 1024) * rest
    inner = 1024 * (high % m) + low
    return i * q + 1024 * (high // m) + inner // m, inner % m


def uniform_kept(
    rank: Int[Array, "*B"], present: Int[Array, "*B"], kept: Int[Array, "*B"]
) -> Bool[Array, "*B"]:
    """Whether the token of this rank is among `kept` spread evenly over `present`.

    Index i of k is floor(i (n-1) / (k-1)), exactly, for i from 0; with k = 1 it is 0.
    """
    rank, present, kept = (z.astype(jnp.uint32) for z in (rank, present, kept))
    last, steps = jnp.maximum(present, 2) - 1, jnp.maximum(kept, 2) - 1
    # The first i whose index reaches this rank; it is kept if that index is the rank.
    quotient, remainder = _multiply_divide(rank, steps, last)
    i = quotient + (remainder > 0)
    index, _ = _multiply_divide(i, last, steps)
    chosen = (i < kept) & (index == rank)
    return jnp.where(kept == 1, rank == 0, chosen) & (kept > 0)


@functools.partial(jax.jit, static_argnames=("keep", "capacity", "select"))
def select_tokens(
    is_vision: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    vision_counts: Int[Array, "B Z"],
    scores: Float[Array, "B T"] | None,
    *,
    keep: float,
    capacity: int,
    select: str,
) -> Bool[Array, "B T"]:
    """Which tokens stay: all text, and of each sample's vision tokens its share.

    `vision_counts` are original ones. Equal scores go to the earlier token, so that
    the choice does not depend on the backend.
    """
    table = jnp.asarray(kept_counts(keep, capacity))
    kept = jax.vmap(lambda t, s: t[s])(table[vision_counts], segment_ids)
    rank, present = _rank_in_segment(is_vision, segment_ids, vision_counts.shape[1])
    if select == "uniform":
        chosen = uniform_kept(rank, present, jnp.minimum(kept, present))
    else:
        chosen = _order_by_score(is_vision, segment_ids, scores) < kept
    return jnp.where(is_vision, chosen, segment_ids > 0)


def _rank_in_segment(
    mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"], num_ids: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Each marked token's number among those of its segment, and their count."""

    def row(mask, ids):
        marked = mask.astype(jnp.int32)
        totals = jax.ops.segment_sum(marked, ids, num_segments=num_ids)
        before = jnp.cumsum(totals) - totals
        # Padding (id 0) marks nothing, and segments stand in the order of their ids.
        return jnp.cumsum(marked) - 1 - before[ids], totals[ids]

    return jax.vmap(row)(mask, segment_ids)


def _order_by_score(
    is_vision: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    scores: Float[Array, "B T"],
) -> Int[Array, "B T"]:
    """Each vision token's place when its segment's are sorted by falling score."""
    T = is_vision.shape[1]
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), is_vision.shape)
    ids = jnp.where(is_vision, segment_ids, jnp.iinfo(jnp.int32).max)
    ids, _, order = jax.lax.sort((ids, -scores, index), dimension=1, num_keys=3)
    first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return jax.vmap(lambda o, p: jnp.zeros_like(o).at[o].set(p))(order, index - starts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped:
    """The vision tokens a stage removed; segment id 0 is padding."""

    x: Float[Array, "B R D"]
    segment_ids: Int[Array, "B R"]


def split_stream(
    stream: Stream, kept: Bool[Array, "B T"], keep: float
) -> tuple[Stream, Dropped]:
    """Closes the stream up over the kept tokens; the rest comes back beside it."""
    T, before = stream.x.shape[1], stream.vision_capacity
    after = min(
        before, kept_capacity(keep, stream.original_capacity, stream.num_segments)
    )
    num_dropped = whole_shards(dropped_capacity(before, after, stream.num_segments))
    gone, real = where_true(stream.is_vision & ~kept, num_dropped)
    dropped = Dropped(
        x=move_tokens(stream.x, gone),
        segment_ids=jnp.where(real, take(stream.segment_ids, gone), 0),
    )
    stay, real = where_true(kept, whole_shards(T - before + after))
    pick = lambda values, padding=0: jnp.where(real, take(values, stay), padding)
    return dataclasses.replace(
        stream,
        x=jnp.where(real[..., None], move_tokens(stream.x, stay), 0),
        roles=pick(stream.roles),
        segment_ids=pick(stream.segment_ids),
        positions=pick(stream.positions, -1),
        vision_capacity=after,
    ), dropped


class Transfer(nnx.Module):
    """Gated cross-attention from instruction tokens to dropped vision tokens.

    `text + tanh(alpha) * CrossAttention(text, dropped)` on the raw residual. The
    gate starts closed, so an untrained transfer is the identity and can be added to
    a pretrained model without disturbing it.
    """

    def __init__(self, cfg: AttentionConfig, *, rngs: nnx.Rngs):
        self.log_base = cfg.log_base
        for name, module in projections(cfg, rngs).items():
            setattr(self, name, module)
        self.alpha = nnx.Param(jnp.zeros((), cfg.param_dtype))

    def query(
        self, text: Float[Array, "B T D"], counts: Int[Array, "B T"]
    ) -> Float[Array, "B T N H"]:
        """Queries of text of which each token sees `counts` dropped ones."""
        return scale_queries(self.q(text), counts, self.log_base)

    def add(
        self, text: Float[Array, "B T D"], read: Float[Array, "B T N H"]
    ) -> Float[Array, "B T D"]:
        """`text` with what it read, as far as the gate is open."""
        return text + self.gated(read)

    def gated(self, read: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """What is added to text that read this, as far as the gate is open."""
        read = self.out(read)
        return jnp.tanh(self.alpha[...].astype(jnp.float32)).astype(read.dtype) * read

    def __call__(
        self,
        text: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        dropped: Dropped,
    ) -> Float[Array, "B T D"]:
        """`text` after each token has read the dropped tokens of its own sample."""
        counts = readable(segment_ids, dropped)
        return text + self.read(text, segment_ids, counts, dropped)

    def read(
        self,
        text: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        counts: Int[Array, "B T"],
        dropped: Dropped,
        axis: str | None = None,
    ) -> Float[Array, "B T D"]:
        """What each token is to add, of which `counts` dropped ones are its sample's.

        With an `axis`, `dropped` is a shard of all of them along it.
        """
        run = functools.partial(attention_to_shards, axis_name=axis)
        if axis is None:
            run = functools.partial(attention, causal=False)
        read = run(
            self.query(text, counts),
            self.k(dropped.x),
            self.v(dropped.x),
            q_segment_ids=segment_ids,
            kv_segment_ids=dropped.segment_ids,
            kv_mask=dropped.segment_ids > 0,
        )
        return self.gated(read)


def readable(segment_ids: Int[Array, "B T"], dropped: Dropped) -> Int[Array, "B T"]:
    """How many dropped tokens are of each token's sample."""
    mine = segment_ids[:, :, None] == dropped.segment_ids[:, None, :]
    return jnp.sum(mine, axis=-1)


def receivers(stream: Stream, transfer_to: str) -> Bool[Array, "B T"]:
    """The text tokens that a transfer adds to."""
    question = stream.roles == Role.INSTRUCTION
    if transfer_to == "instruction":
        return question
    begun, _ = _rank_in_segment(
        question | (stream.roles == Role.ANSWER),
        stream.segment_ids,
        stream.num_segments + 1,
    )
    return stream.is_text & (begun >= 0)


def transfer(
    module: Transfer,
    stream: Stream,
    dropped: Dropped,
    transfer_to: str,
    *,
    path: str,
    dtype: str,
) -> Stream:
    """The stream after its receiving tokens have read `dropped`.

    `path` names the module's parameters, and `dtype` is what they compute in.
    """
    T = stream.roles.shape[1]
    text_capacity = T - stream.vision_capacity
    index, real = where_true(receivers(stream, transfer_to), text_capacity)
    ids = jnp.where(real, take(stream.segment_ids, index), -1)
    args = read_tokens(stream.x, index), ids, readable(ids, dropped), dropped
    if sharding.active_mesh() is None:
        new = module.read(*args)
    else:
        axis = sharding.context_axis()
        new = sharding.on_shards(
            lambda module, *args: sharding.sum_shards(
                module.read(*args, axis), "tensor"
            ),
            {path: module},
            *args,
            in_specs=(sharding.BATCH, sharding.BATCH, sharding.BATCH, sharding.TOKENS),
            out_specs=sharding.BATCH,
            dtype=dtype,
        )
    index = jnp.where(real, index, T)  # Outside: added nowhere.
    return dataclasses.replace(stream, x=add_tokens(stream.x, index, new))
