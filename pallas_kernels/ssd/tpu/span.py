"""The backward kernel's walk forwards: what it leaves of a span of time in VMEM."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd.tpu import pieces
from pallas_kernels.ssd.tpu.pieces import head_rows, matmul, sum_along, turned
from pallas_kernels.ssd.tpu.plan import CHUNK, Plan

SMALL = 2.0**-96  # A step below it counts as it: its part of dx is divided by it.
_HUGE = 126.0  # As in forward.py.


class Span(NamedTuple):
    """What the walk backwards reads, chunk by chunk."""

    x: jax.Array  # W L: on its side.
    state: jax.Array  # W S: before the chunk, as matmuls read it.
    dt: jax.Array  # R L
    before: jax.Array  # R L: the running sum of log decay, less log dt.
    from_start: jax.Array  # R L: decay of the state before the chunk, at a token.
    to_end: jax.Array  # R L: decay of a token, in the state behind the chunk.
    end_weight: jax.Array  # R L: the same times dt.
    own: jax.Array  # R L: c_k . b_k, the same for each head.
    skip: jax.Array  # R L: what dx gets of dy of the same token.
    across: jax.Array  # R S: decay of the whole chunk, the same in each lane.
    total_down: jax.Array  # L R: the running sum of log decay.
    scores: jax.Array  # L L: c_m . b_k, m down the rows; zero unless m is later than k.
    ceiling: jax.Array  # L L: of the exponents: -inf where m may not see k.
    b_side: jax.Array  # S L
    c_side: jax.Array  # S L


def span_shapes(plan: Plan, dtype) -> Span:
    """Scratch for all chunks of a span."""
    W, R, L, S = plan.width, plan.heads, CHUNK, plan.state_dim
    rows = [(R, L)] * 7
    sizes = [(W, L), (W, S), *rows, (R, S), (L, R), (L, L), (L, L), (S, L), (S, L)]
    dtypes = [dtype] * 2 + [jnp.float32] * 11 + [dtype] * 2
    return Span(
        *(
            pltpu.VMEM((plan.blocks_per_span * plan.chunks, *size), kind)
            for size, kind in zip(sizes, dtypes, strict=True)
        )
    )


def walk_forwards(refs, span: Span, state, place, inside, rows_of, plan, packed):
    """Puts one block's chunks into `span`, and moves the state behind them."""
    dtype = refs.x.dtype
    slots = [place * plan.chunks + t for t in range(plan.chunks)]
    for t, slot in enumerate(slots):
        for tile in pieces.tiles(plan.width):
            span.x[slot, tile] = turned(rows_of(refs.x, t, tile), dtype)
        _keep_decays(t, slot, refs, span, inside, packed)
        _keep_maps(t, slot, refs, span, rows_of)
    for t, slot in enumerate(slots):
        b = rows_of(refs.b, t)
        span.state[slot] = state[...].astype(dtype)
        for h in range(plan.heads):
            rows, one = head_rows(h, plan.head_dim), slice(h, h + 1)
            x = span.x[slot, rows].astype(jnp.float32) * span.end_weight[slot, one]
            own = matmul(x.astype(dtype), b)
            state[rows] = state[rows] * span.across[slot, one] + own


def _keep_decays(t, slot, refs, span: Span, inside, packed: bool):
    """Behind the last token dt is zero, which leaves the state as it is."""
    time = slice(t * CHUNK, (t + 1) * CHUNK)
    earlier, seen = pieces.earlier_or_same(), pieces.later_or_same()
    dt = jnp.where(inside, refs.dt[0, 0, :, time], 0.0)
    total = sum_along(dt * refs.a[0], earlier)
    last = total[:, CHUNK - 1 :]
    from_start = jnp.exp2(total)
    to_end = jnp.exp2(last - total)
    across = jnp.exp2(jnp.broadcast_to(last, span.across.shape[1:]))
    if packed:
        starts = jnp.where(inside, refs.starts[0, :, time], 0.0)
        run = sum_along(jnp.broadcast_to(starts, (8, CHUNK)), earlier)
        run_down, run = run.T[:, :1], run[:1]
        leaving = run[:, CHUNK - 1 :]
        from_start = jnp.where(run == 0, from_start, 0.0)
        to_end = jnp.where(run == leaving, to_end, 0.0)
        across = jnp.where(leaving == 0, across, 0.0)
        seen &= run == run_down
    span.dt[slot], span.before[slot] = dt, total - jnp.log2(jnp.maximum(dt, SMALL))
    span.from_start[slot], span.to_end[slot] = from_start, to_end
    span.end_weight[slot] = to_end * dt
    span.across[slot], span.total_down[slot] = across, total.T
    span.ceiling[slot] = jnp.where(seen, _HUGE, -jnp.inf)


def _keep_maps(t, slot, refs, span: Span, rows_of):
    """b and c on their side, and their products."""
    dtype = refs.b.dtype
    span.b_side[slot] = turned(rows_of(refs.b, t), dtype)
    span.c_side[slot] = turned(rows_of(refs.c, t), dtype)
    scores = matmul(rows_of(refs.c, t), span.b_side[slot])
    earlier, later = pieces.earlier_or_same(), pieces.later_or_same()
    span.scores[slot] = jnp.where(earlier, 0.0, scores)
    own = jnp.sum(jnp.where(earlier & later, scores, 0.0), 0, keepdims=True)
    own = jnp.broadcast_to(own, span.own.shape[1:])
    span.own[slot] = own
    span.skip[slot] = refs.d[0] + own * span.dt[slot]
