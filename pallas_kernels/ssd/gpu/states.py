"""The states between chunks: what each chunk adds, and the scan that sums them up.

Backwards the same two steps make the states' cotangents. A state lies as S x P here, so
that the wide side meets the tensor core's.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.ssd.gpu import pieces
from pallas_kernels.ssd.gpu.plan import Plan

_WIDTH = 2048  # Numbers of a state that one program of the scan carries.


def of_chunks(
    channels: Float[Array, "B T N P"],
    maps: Float[Array, "B T G S"],
    weights: Float[Array, "B N C L"],
    plan: Plan,
) -> Float[Array, "B N C S P"]:
    """Every chunk's own sum of weight maps^T channels, in float32.

    Forwards that is what the chunk adds to the state behind it, from x, b and the decay
    to its end; backwards what it adds to the cotangent of the state before it, from dy,
    c and the decay from its start.
    """
    shape = (plan.batch, plan.heads, plan.chunks, plan.state_dim, plan.head_dim)
    return pieces.call(
        ssd_gpu_states,
        plan,
        grid=pieces.grid(plan, tiles=1),
        in_specs=[pieces.channels(plan), pieces.maps(plan), pieces.rows(plan)],
        out_specs=pieces.state(plan),
        out_shape=pieces.struct(shape),
    )(channels, maps, weights)


def ssd_gpu_states(channels_ref, maps_ref, weights_ref, out_ref, *, plan: Plan):
    """One head of one chunk, tile by tile."""
    valid = pieces.validity(plan)

    def one_tile(tile, sums):
        there, weight = valid(tile), weights_ref[pieces.rows_of(tile, plan)]
        maps = pieces.load_maps(maps_ref, tile, plan, there)
        channels = pieces.load_channels(channels_ref, tile, plan, there)
        return tuple(
            s + pieces.matmul(maps, pieces.scaled(z, weight), (0, 0))
            for s, z in zip(sums, channels, strict=True)
        )

    zeros = pieces.zeros(plan.state_dim, plan)
    sums = lax.fori_loop(0, plan.tiles, one_tile, zeros)
    for part, s in zip(pieces.channel_parts(plan), sums, strict=True):
        out_ref[:, part] = s


def scan(
    first: Float[Array, "B N S P"],
    across: Float[Array, "B N C"],
    own: Float[Array, "B N C S P"],
    dtype: jnp.dtype,
    plan: Plan,
) -> tuple[Float[Array, "B N C S P"], Float[Array, "B N S P"]]:
    """The state before every chunk, for matmuls in `dtype`, and after the last."""
    size = plan.state_dim * plan.head_dim
    width = _width(size)
    before, last = pieces.call(
        ssd_gpu_scan,
        plan,
        grid=_scan_grid(plan),
        in_specs=[_one_state(width), _decays(plan), _all_states(plan, width)],
        out_specs=[_all_states(plan, width), _one_state(width)],
        out_shape=[
            pieces.struct((*own.shape[:3], size), dtype),
            pieces.struct((*first.shape[:2], size)),
        ],
    )(_flat(first), across, _flat(own))
    return before.reshape(own.shape), last.reshape(first.shape)


def ssd_gpu_scan(first_ref, across_ref, own_ref, before_ref, last_ref, *, plan: Plan):
    """A part of one head's state, from chunk to chunk."""

    def one_chunk(j, state):
        before_ref[j] = state.astype(before_ref.dtype)
        return across_ref[j] * state + own_ref[j]

    last_ref[...] = lax.fori_loop(0, plan.chunks, one_chunk, first_ref[...])


def scan_back(
    dlast: Float[Array, "B N S P"],
    across: Float[Array, "B N C"],
    own: Float[Array, "B N C S P"],
    before: Float[Array, "B N C S P"],
    plan: Plan,
) -> tuple[Float[Array, "B N C S P"], Float[Array, "B N S P"], Float[Array, "B N C"]]:
    """Cotangents of the state after every chunk, of the first, and of log `across`.

    `before` are the states that `scan` returned.
    """
    size = plan.state_dim * plan.head_dim
    width = _width(size)
    per_part = pl.BlockSpec(
        (None, None, None, plan.chunks), lambda i, n, b: (b, n, i, 0)
    )
    states = _all_states(plan, width)
    after, dfirst, crossing = pieces.call(
        ssd_gpu_scan_back,
        plan,
        grid=_scan_grid(plan),
        in_specs=[_one_state(width), _decays(plan), states, states],
        out_specs=[states, _one_state(width), per_part],
        out_shape=[
            pieces.struct((*own.shape[:3], size), before.dtype),
            pieces.struct((*dlast.shape[:2], size)),
            pieces.struct((*dlast.shape[:2], size // width, plan.chunks)),
        ],
    )(_flat(dlast), across, _flat(own), _flat(before))
    return after.reshape(own.shape), dfirst.reshape(dlast.shape), crossing.sum(2)


def ssd_gpu_scan_back(
    last_ref,
    across_ref,
    own_ref,
    before_ref,
    after_ref,
    first_ref,
    crossing_ref,
    *,
    plan: Plan,
):
    """A part of one head's cotangent, from the last chunk to the first."""

    def one_chunk(step, state):
        j = plan.chunks - 1 - step
        after_ref[j] = state.astype(after_ref.dtype)
        entering = across_ref[j] * state
        crossing_ref[j] = jnp.sum(entering * before_ref[j].astype(jnp.float32))
        return entering + own_ref[j]

    first_ref[...] = lax.fori_loop(0, plan.chunks, one_chunk, last_ref[...])


def _flat(states: Float[Array, "*rest S P"]) -> Float[Array, "*rest X"]:
    return states.reshape(*states.shape[:-2], -1)


def _width(size: int) -> int:
    """The largest power of two that divides a state, up to `_WIDTH`."""
    return min(_WIDTH, size & -size)


def _scan_grid(plan: Plan) -> tuple[int, int, int]:
    size = plan.state_dim * plan.head_dim
    return size // _width(size), plan.heads, plan.batch


def _one_state(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, width), lambda i, n, b: (b, n, i))


def _all_states(plan: Plan, width: int) -> pl.BlockSpec:
    block = (None, None, plan.chunks, width)
    return pl.BlockSpec(block, lambda i, n, b: (b, n, 0, i))


def _decays(plan: Plan) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, plan.chunks), lambda i, n, b: (b, n, 0))
