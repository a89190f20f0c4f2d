"""The backward kernel: one pass in reverse, states made again from sparse ones.

Time is cut into spans that start with a saved state. Taking them from the last, a span
is walked twice: forwards, to put the state before every chunk and what its decays are
into VMEM (`span.py`), then backwards with `ds`, the cotangent of the state behind the
chunk.

With k the earlier token and m the later, o and e the decays from the chunk's start and
to its end, L_mk = exp(c_m - c_k) and W_mk = L_mk dt_k (c_m . b_k), for each head:

  dx_k    = sum_m W_mk dy_m  +  dt_k e_k ds b_k  +  d dy_k
  dc_m    = sum_k L_mk dt_k (dy_m . x_k) b_k  +  o_m dy_m^T s
  db_k    = sum_m L_mk dt_k (dy_m . x_k) c_m  +  e_k dt_k x_k^T ds
  ds     <- o_end ds  +  sum_m o_m dy_m c_m^T

The gradient of the log decay of token t is the sum of all terms that its decay is a
factor of: those from a k < t to an m >= t, from the state before to an m >= t, from a
k < t to the state behind, and from state to state. Terms from k to m enter as what m
receives, dy_m . (sum_k W_mk x_k), less what k sends, x_k . (sum_m W_mk dy_m). Both are
matmuls with the same rounded W, x and dy, without k = m: nothing but float32 rounding
is left of a pair that does not cross t, and no matrix is summed along its rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd.tpu import pieces
from pallas_kernels.ssd.tpu.pieces import head_rows, matmul, sum_along, turned
from pallas_kernels.ssd.tpu.plan import CHUNK, LANES, Plan
from pallas_kernels.ssd.tpu.span import SMALL, Span, span_shapes, walk_forwards

_AHEAD, _BEHIND = 2, 2  # As in forward.py.


class _Inputs(NamedTuple):
    x: jax.Array
    dy: jax.Array
    dt: jax.Array
    starts: jax.Array
    a: jax.Array
    d: jax.Array
    b: jax.Array
    c: jax.Array
    saved: jax.Array
    last: jax.Array


class _Outputs(NamedTuple):
    dx: jax.Array
    ddt: jax.Array
    da: jax.Array
    dd: jax.Array
    db: jax.Array
    dc: jax.Array
    dstate: jax.Array


class _Work(NamedTuple):
    """Scratch for each chunk of a block, on its side."""

    dy: jax.Array  # W L
    dx: jax.Array  # W L
    dy_start: jax.Array  # W L: dy, decayed from the chunk's start.
    x_end: jax.Array  # W L: x dt, decayed to the chunk's end.
    dstate: jax.Array  # W S: behind the chunk, as matmuls read it.
    received: jax.Array  # R L: of the terms between tokens, what the later one gets.
    sent: jax.Array  # R L: and what the earlier one gives.
    before: jax.Array  # R L: dy . (state before) c, not yet decayed.
    behind: jax.Array  # R L: x . (ds behind) b, not yet decayed.
    same: jax.Array  # R L: x . dy
    across: jax.Array  # R S: ds behind . state before, summed over channels.
    dscores: jax.Array  # L L


def _work_shapes(plan: Plan, dtype) -> _Work:
    W, R, L, S = plan.width, plan.heads, CHUNK, plan.state_dim
    f32 = jnp.float32
    wide = [((W, L), f32)] * 2 + [((W, L), dtype)] * 2 + [((W, S), dtype)]
    small = [((R, L), f32)] * 5 + [((R, S), f32), ((L, L), f32)]
    return _Work(
        *(pltpu.VMEM((plan.chunks, *shape), kind) for shape, kind in wide + small)
    )


def _chunk_backwards(t, slot, refs, out, span, all_work, rows_of, plan: Plan):
    """Gradients of one chunk's tokens; moves `out.dstate` before the chunk."""
    time = slice(t * CHUNK, (t + 1) * CHUNK)
    work = _Work(*(z.at[t] for z in all_work))
    dtype, P = refs.x.dtype, plan.head_dim
    down = lambda z: jnp.sum(z, 0, keepdims=True)

    def turn_in(tile):
        work.dy[tile] = turned(rows_of(refs.dy, t, tile), jnp.float32)

    def turn_out(tile):
        out.dx[0, time, tile] = turned(work.dx[tile], out.dx.dtype)

    def weigh(h):
        exponent = span.total_down[slot, :, h : h + 1] - span.before[slot, h : h + 1]
        decay = jnp.exp2(jnp.minimum(exponent, span.ceiling[slot]))
        return decay, (span.scores[slot] * decay).astype(dtype)

    def multiply(h, decay, weights):
        rows, one = head_rows(h, P), slice(h, h + 1)
        dy, x = work.dy[rows], span.x[slot, rows]
        dy_start = (dy * span.from_start[slot, one]).astype(dtype)
        dstate = out.dstate[0, rows].astype(dtype)
        x_end = x.astype(jnp.float32) * span.end_weight[slot, one]
        work.x_end[rows] = x_end.astype(dtype)
        work.dy_start[rows], work.dstate[rows] = dy_start, dstate
        return (
            decay,
            matmul(rows_of(refs.dy, t, rows), x),
            matmul(x, weights, turn_b=True),
            matmul(dy.astype(dtype), weights),
            matmul(dstate, span.b_side[slot]),
            matmul(span.state[slot, rows], span.c_side[slot]),
            matmul(dy_start, rows_of(refs.c, t)),
        )

    def finish(h, decay, pairs, outputs, inside, behind, before, own):
        rows, one = head_rows(h, P), slice(h, h + 1)
        pairs = pairs * decay
        work.dscores[...] = pairs if h == 0 else work.dscores[...] + pairs
        dy, x = work.dy[rows], span.x[slot, rows].astype(jnp.float32)
        work.received[one] = down(dy * outputs)
        work.sent[one] = down(x * inside)
        work.behind[one] = down(x * behind)
        work.same[one] = down(x * dy)
        work.dx[rows] = (
            inside + behind * span.end_weight[slot, one] + dy * span.skip[slot, one]
        )
        work.before[one] = down(dy * before)
        dstate = out.dstate[0, rows]
        state = span.state[slot, rows].astype(jnp.float32)
        work.across[one] = down(dstate * state)
        out.dstate[0, rows] = dstate * span.across[slot, one] + own

    weights, products = {}, {}
    behind = min(_BEHIND, plan.heads - 1)

    def head(i):
        if i + _AHEAD < plan.heads:
            weights[i + _AHEAD] = weigh(i + _AHEAD)
        if 0 <= i < plan.heads:
            products[i] = multiply(i, *weights.pop(i))
        if i >= behind:
            finish(i - behind, *products.pop(i - behind))

    def decays():
        seen = pieces.later_or_same()
        dt = span.dt[slot]
        from_start = work.before[...] * span.from_start[slot]
        dlog = sum_along(work.received[...] - work.sent[...] + from_start, seen)
        dlog += sum_along(work.behind[...] * span.end_weight[slot], ~seen)
        dlog += jnp.sum(work.across[...] * span.across[slot], 1, keepdims=True)
        direct = work.sent[...] / jnp.maximum(dt, SMALL)
        direct += work.behind[...] * span.to_end[slot]
        direct += work.same[...] * span.own[slot]
        out.ddt[0, 0, :, time] = direct + refs.a[0] * math.log(2) * dlog
        out.da[0, 0] += dt * dlog
        out.dd[0, 0] += work.same[...]

    def dc():
        own = matmul(work.dscores[...].astype(dtype), rows_of(refs.b, t))
        dy_start = turned(work.dy_start[...], dtype)
        own += matmul(dy_start, span.state[slot])
        out.dc[0, 0, time] = own.astype(out.dc.dtype)

    def db():
        own = matmul(turned(work.dscores[...], dtype), rows_of(refs.c, t))
        own += matmul(turned(work.x_end[...], dtype), work.dstate[...])
        out.db[0, 0, time] = own.astype(out.db.dtype)

    tiles = pieces.tiles(plan.width)
    for tile in tiles:
        turn_in(tile)
    for i in range(-_AHEAD, plan.heads + behind):
        head(i)
    dc()
    for tile in tiles:
        turn_out(tile)
    db()
    decays()


def _walk_backwards(refs, out, span, work, place, rows_of, plan: Plan):
    """The chunks of a block, the last first."""
    for t in reversed(range(plan.chunks)):
        slot = place * plan.chunks + t
        _chunk_backwards(t, slot, refs, out, span, work, rows_of, plan)


def _kernel(*refs, plan: Plan, spans: int, packed: bool):
    refs = list(refs)
    take = lambda kind: kind(*(refs.pop(0) for _ in kind._fields))
    inputs, out, span, work = take(_Inputs), take(_Outputs), take(Span), take(_Work)
    (state,) = refs
    row, part, nth, step = (pl.program_id(i) for i in range(4))
    half = plan.blocks_per_span
    forwards = step < half
    place = jnp.where(forwards, step, 2 * half - 1 - step)
    block = (spans - 1 - nth) * half + place

    def rows_of(ref, t, channels=slice(None)):
        first = block * plan.block + t * CHUNK
        rows = ref[0, t * CHUNK : (t + 1) * CHUNK, channels]
        cut = plan.ragged or plan.blocks % half != 0
        return pieces.valid_rows(rows, first, plan.tokens, cut)

    @pl.when((nth == 0) & (step == 0))
    def _():
        channels = pl.ds(part * plan.width, plan.width)
        pltpu.sync_copy(inputs.last.at[row, channels], out.dstate.at[0])
        out.da[...] = jnp.zeros_like(out.da)
        out.dd[...] = jnp.zeros_like(out.dd)

    @pl.when(step == 0)
    def _():
        pltpu.sync_copy(inputs.saved.at[0, 0], state)

    @pl.when(forwards)
    def _():
        inside = block < plan.blocks
        walk_forwards(inputs, span, state, place, inside, rows_of, plan, packed)

    @pl.when(~forwards)
    def _():
        _walk_backwards(inputs, out, span, work, place, rows_of, plan)


def run(
    x: jax.Array,
    dy: jax.Array,
    dt: jax.Array,
    starts: jax.Array | None,
    a: jax.Array,
    d: jax.Array,
    b: jax.Array,
    c: jax.Array,
    saved: jax.Array,
    dlast: jax.Array,
    plan: Plan,
) -> _Outputs:
    """Runs the kernel on arrays as forward.run has them, `saved` from there.

    da and dd come with 128 parts of each sum, db and dc [parts B T G*S] with one for
    each part of a group's heads, ddt on its side like dt.
    """
    W, S, R, parts = plan.width, plan.state_dim, plan.heads, plan.parts
    K = plan.block
    spans, half = saved.shape[1], plan.blocks_per_span
    packed = starts is not None
    if starts is None:
        starts = jnp.zeros((plan.batch, 1, K), jnp.float32)

    def block(place):
        return lambda n, s: jnp.minimum(
            (spans - 1 - n) * half + place(s), plan.blocks - 1
        )

    # Where one of the two walks does not need an array, it stays for the other.
    back = block(lambda s: 2 * half - 1 - jnp.maximum(s, half))
    forth = block(lambda s: jnp.minimum(s, half - 1))
    both = block(lambda s: jnp.where(s < half, s, 2 * half - 1 - s))
    tokens = lambda at: pl.BlockSpec((1, K, W), lambda i, g, n, s: (i, at(n, s), g))
    rows = lambda at: pl.BlockSpec((1, 1, R, K), lambda i, g, n, s: (i, g, 0, at(n, s)))
    maps = pl.BlockSpec((1, K, S), lambda i, g, n, s: (i, both(n, s), g // parts))
    dmaps = pl.BlockSpec(
        (1, 1, K, S), lambda i, g, n, s: (g % parts, i, back(n, s), g // parts)
    )
    per_head = pl.BlockSpec((1, R, LANES), lambda i, g, n, s: (g, 0, 0))
    sums = pl.BlockSpec((1, 1, R, LANES), lambda i, g, n, s: (i, g, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    f32 = jnp.float32
    dmap = jax.ShapeDtypeStruct((parts, *b.shape), b.dtype if parts == 1 else f32)
    sum_shape = jax.ShapeDtypeStruct((plan.batch, plan.groups * parts, R, LANES), f32)
    outputs = _Outputs(
        dx=(tokens(back), jax.ShapeDtypeStruct(x.shape, x.dtype)),
        ddt=(rows(back), jax.ShapeDtypeStruct(dt.shape, f32)),
        da=(sums, sum_shape),
        dd=(sums, sum_shape),
        db=(dmaps, dmap),
        dc=(dmaps, dmap),
        dstate=(
            pl.BlockSpec((1, W, S), lambda i, g, n, s: (i, g, 0)),
            jax.ShapeDtypeStruct(dlast.shape, f32),
        ),
    )
    starts_at = forth if packed else lambda n, s: 0
    inputs = _Inputs(
        x=tokens(forth),
        dy=tokens(back),
        dt=rows(forth),
        starts=pl.BlockSpec((1, 1, K), lambda i, g, n, s: (i, 0, starts_at(n, s))),
        a=per_head,
        d=per_head,
        b=maps,
        c=maps,
        saved=pl.BlockSpec((1, 1, W, S), lambda i, g, n, s: (i, spans - 1 - n, g, 0)),
        last=anywhere,
    )
    out = pl.pallas_call(
        functools.partial(_kernel, plan=plan, spans=spans, packed=packed),
        grid=(plan.batch, plan.groups * parts, spans, 2 * half),
        in_specs=list(inputs),
        out_specs=[spec for spec, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        scratch_shapes=[
            *span_shapes(plan, x.dtype),
            *_work_shapes(plan, x.dtype),
            pltpu.VMEM((W, S), f32),
        ],
        interpret=plan.interpret,
        name="ssd_backward",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=64 << 20,
        ),
    )(x, dy, dt, starts, a, d, b, c, saved, dlast)
    return _Outputs(*out)
