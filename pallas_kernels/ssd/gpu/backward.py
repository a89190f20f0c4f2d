"""The gradients of a chunk, once its first state and its last's cotangent are known.

Three kernels: one makes dx of a head; one multiplies y's cotangents by x for all pairs
of tokens, for the decay between them, and sums over the heads of a group; and from
these sums a third makes db and dc, one program with early and late exchanged.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from pallas_kernels.ssd.gpu import pieces
from pallas_kernels.ssd.gpu.plan import Plan
from pallas_kernels.ssd.gpu.rows import Rows


def of_channels(
    x: Float[Array, "B T N P"],
    dy: Float[Array, "B T N P"],
    rows: Rows,
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    d: Float[Array, "N"],
    dstates: Float[Array, "B N C S P"],
    plan: Plan,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N C L"], Float[Array, "B N C I"]]:
    """dx; of dt's cotangent, the part that is not decay's; d's, tile by tile.

    `dstates` are cotangents of the state after every chunk.
    """
    row, sizes = pieces.rows(plan), (plan.batch, plan.heads, plan.chunks)
    return pieces.call(
        ssd_gpu_dx,
        plan,
        grid=pieces.grid(plan, tiles=plan.tiles),
        in_specs=[
            *(pieces.channels_of_tile(plan), pieces.channels(plan)),
            *(pieces.maps(plan), pieces.maps(plan)),
            *(row, row, row, pieces.runs(plan)),
            *(pieces.per_head(), pieces.state(plan)),
        ],
        out_specs=[
            pieces.channels_of_tile(plan),
            pieces.rows_of_tile(plan),
            pieces.per_tile(plan),
        ],
        out_shape=[
            pieces.struct(x.shape, x.dtype),
            pieces.struct((*sizes, plan.chunk)),
            pieces.struct((*sizes, plan.tiles)),
        ],
    )(x, dy, b, c, rows.dt, rows.log_decay, rows.to_end, rows.run, d, dstates)


def ssd_gpu_dx(
    x_ref,
    dy_ref,
    b_ref,
    c_ref,
    dt_ref,
    log_decay_ref,
    to_end_ref,
    run_ref,
    d_ref,
    dstate_ref,
    dx_ref,
    direct_ref,
    dd_ref,
    *,
    plan: Plan,
):
    """One tile of early tokens: the state behind, then the tiles from its own on."""
    own, valid = pieces.program_tile(), pieces.validity(plan)
    there, every = valid(own), pieces.channel_parts(plan)
    token = lambda tile: pieces.token(tile, plan, log_decay_ref, run_ref)
    early = token(own)
    load_b = lambda: pieces.load_map_parts(b_ref, own, plan, there)
    b = load_b()

    def one_tile(tile, sums):
        there = valid(tile)
        c = pieces.load_map_parts(c_ref, tile, plan, there)
        # Kept in two parts through the loop, float32 would not fit registers.
        scores = pieces.over_parts(b if plan.narrow else load_b(), c)
        weight = scores * pieces.decay(token(tile), early, 1)
        dy = pieces.load_channels(dy_ref, tile, plan, there)
        return tuple(
            s + pieces.matmul(weight.astype(z.dtype), z)
            for s, z in zip(sums, dy, strict=True)
        )

    to_end = to_end_ref[pieces.rows_of(own, plan)][:, None]
    leaving = tuple(z * to_end for z in pieces.read(b, dstate_ref, plan))
    sums = lax.fori_loop(own, plan.tiles, one_tile, leaving)

    dt, d = dt_ref[pieces.rows_of(own, plan)][:, None], d_ref[0]
    direct = dd = jnp.zeros((plan.tile,), jnp.float32)
    for part, s in zip(every, sums, strict=True):
        x = pieces.load(x_ref, (slice(None), part), there).astype(jnp.float32)
        dy = pieces.load(dy_ref, (pieces.rows_of(own, plan), part), there).astype(
            jnp.float32
        )
        pieces.store(dx_ref, (slice(None), part), dt * s + d * dy, there)
        direct, dd = direct + jnp.sum(x * s, axis=1), dd + jnp.sum(x * dy, axis=1)
    direct_ref[...], dd_ref[0] = direct, jnp.sum(dd)


class Pairs(NamedTuple):
    """What pairs of tokens say. A tile that would come before another holds anything.

    Terms of the loss go from an early token to a late one.
    """

    scores: Float[Array, "B C G L L"]  # Cotangents of c b^T (late, early).
    by_late: Float[Array, "B N C I L"]  # From a tile (I), summed for each late token;
    # within a tile, summed for each token that they cross.
    by_early: Float[Array, "B N C I L"]  # To a later tile (I), for each early token.


def of_pairs(
    x: Float[Array, "B T N P"],
    dy: Float[Array, "B T N P"],
    rows: Rows,
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    plan: Plan,
) -> Pairs:
    """Products of y's cotangents and x within chunks, in all that is made of them."""
    row, channels = pieces.rows_of_group(plan), pieces.channels_of_group(plan)
    maps = pieces.maps_of_group(plan)
    sizes = (plan.batch, plan.heads, plan.chunks, plan.tiles, plan.chunk)
    square = (plan.batch, plan.chunks, plan.groups, plan.chunk, plan.chunk)
    out = pieces.call(
        ssd_gpu_dpairs,
        plan,
        grid=pieces.grid(plan, tiles=plan.tiles**2, groups=True),
        in_specs=[channels, channels, maps, maps, row, row, pieces.runs(plan)],
        out_specs=[
            pieces.pair(plan),
            pieces.sums_of_pair(plan, late=True),
            pieces.sums_of_pair(plan, late=False),
        ],
        out_shape=[
            pieces.struct(square, x.dtype),
            pieces.struct(sizes),
            pieces.struct(sizes),
        ],
    )(x, dy, b, c, rows.dt, rows.log_decay, rows.run)
    return Pairs(*out)


def ssd_gpu_dpairs(
    x_ref,
    dy_ref,
    b_ref,
    c_ref,
    dt_ref,
    log_decay_ref,
    run_ref,
    scores_ref,
    by_late_ref,
    by_early_ref,
    *,
    plan: Plan,
):
    """A tile of late tokens with one of early tokens, all heads of a group."""
    valid = pieces.validity(plan)
    late, early = pieces.program_pair(plan)

    def over_heads(add_terms):
        c = pieces.load_map_parts(c_ref, late, plan, valid(late))
        b = pieces.load_map_parts(b_ref, early, plan, valid(early))
        scores = pieces.over_parts(c, b)

        def one_head(head, total):
            token = lambda tile: pieces.token(
                tile, plan, log_decay_ref, run_ref, (head,)
            )
            dy = pieces.load_channels(dy_ref, late, plan, valid(late), (head,))
            x = pieces.load_channels(x_ref, early, plan, valid(early), (head,))
            dt = dt_ref[head, pieces.rows_of(early, plan)]
            dscores = pieces.over_parts(dy, x) * pieces.decay(token(late), token(early))
            dscores *= dt[None, :]
            add_terms(head, dscores * scores)
            return total + dscores

        zeros = jnp.zeros((plan.tile, plan.tile), jnp.float32)
        total = lax.fori_loop(0, plan.heads_per_group, one_head, zeros)
        scores_ref[...] = total.astype(scores_ref.dtype)

    @pl.when(late > early)
    def _():
        def add_terms(head, terms):
            by_late_ref[head] = jnp.sum(terms, axis=1)
            by_early_ref[head] = jnp.sum(terms, axis=0)

        over_heads(add_terms)

    @pl.when(late == early)
    def _():
        row, column = (
            lax.broadcasted_iota(jnp.int32, (plan.tile, plan.tile), i) for i in (0, 1)
        )

        def add_terms(head, terms):
            by_late_ref[head] = _crossing(terms, row < column, x_ref.dtype)

        over_heads(add_terms)


def _crossing(
    terms: Float[Array, "L L"], before: Bool[Array, "L L"], dtype: jnp.dtype
) -> Float[Array, "L"]:
    """For each token of a tile, the sum of the terms from before it to it or behind.

    `terms` are (late, early); `before` is true where the row's token comes earlier than
    the column's.
    """
    from_before = pieces.matmul_with_ones(terms, before, dtype)  # (late, crossed)
    return jnp.sum(jnp.where(before, 0, from_before), axis=0)


def of_maps(
    channels: Float[Array, "B T N P"],
    weights: Float[Array, "B N C L"],
    own: Float[Array, "B T G S"],
    other: Float[Array, "B T G S"],
    states: Float[Array, "B N C S P"],
    pairs: Float[Array, "B C G L L"],
    plan: Plan,
    *,
    late: bool,
) -> tuple[Float[Array, "B T G S"], Float[Array, "B N C L"]]:
    """The gradient of `own`, and the terms between a token and the state.

    dc (late) reads states before the chunks and cotangents dy, weighted by the decay
    from the start; db reads cotangents of states behind and dt x to the end.
    """
    row, channel = pieces.rows_of_group(plan), pieces.channels_of_group(plan)
    maps = pieces.maps_of_group(plan)
    return pieces.call(
        ssd_gpu_dc if late else ssd_gpu_db,
        plan,
        grid=pieces.grid(plan, tiles=plan.tiles, groups=True),
        in_specs=[
            *(channel, row, maps, maps),
            *(pieces.state_of_group(plan), pieces.pairs(plan)),
        ],
        out_specs=[pieces.maps_of_tile(plan), row],
        out_shape=[pieces.struct(own.shape, own.dtype), pieces.struct(weights.shape)],
    )(channels, weights, own, other, states, pairs)


def ssd_gpu_dc(*refs, plan: Plan):
    """One tile of late tokens: states before, and the tiles up to its own."""
    own = pieces.program_tile()
    _dmaps(*refs, plan, (0, own + 1), lambda other: (own, other), (1, 0))


def ssd_gpu_db(*refs, plan: Plan):
    """One tile of early tokens: states behind, and the tiles from its own on."""
    own = pieces.program_tile()
    _dmaps(*refs, plan, (own, plan.tiles), lambda other: (other, own), (0, 0))


def _dmaps(
    channels_ref,
    weights_ref,
    own_ref,
    other_ref,
    states_ref,
    pairs_ref,
    dmaps_ref,
    terms_ref,
    plan: Plan,
    others: tuple,
    pair,
    axes: tuple[int, int],
):
    """Sums over heads, then over the tiles `others`, whose `pair` is contracted."""
    tile, valid = pieces.program_tile(), pieces.validity(plan)
    rows, there = pieces.rows_of(tile, plan), valid(tile)
    own = pieces.load_maps(own_ref, tile, plan, there).astype(jnp.float32)

    def one_head(head, total):
        channels = pieces.load_channels(channels_ref, tile, plan, there, (head,))
        states = [states_ref[head, :, part] for part in pieces.channel_parts(plan)]
        read = pieces.over_parts(channels, states) * weights_ref[head, rows][:, None]
        terms_ref[head, rows] = jnp.sum(read * own, axis=1)
        return total + read

    def one_tile(other, total):
        late, early = (pieces.rows_of(z, plan) for z in pair(other))
        maps = pieces.load_maps(other_ref, other, plan, valid(other))
        return total + pieces.matmul(pairs_ref[late, early], maps, axes)

    total = jnp.zeros((plan.tile, plan.state_dim), jnp.float32)
    total = lax.fori_loop(0, plan.heads_per_group, one_head, total)
    total = lax.fori_loop(*others, one_tile, total)
    pieces.store(dmaps_ref, (slice(None), slice(None)), total, there)
