"""The forward kernel: one pass over x, dt, b and c, the state kept in VMEM.

A step of the grid does three things to three blocks of time, which do not depend on
each other, so that the units of the chip which they load can work at once:

  block n       turn x on its side; decays and b^T c of every chunk     (transposer)
  block n - 1   the chunks' outputs and their states, head by head      (matmul)
  block n - 2   turn y back                                             (transposer)

Within a chunk, k the earlier token and m the later, for each head:

  y_m   = sum_k exp(c_m - c_k) dt_k (b_k . c_m) x_k  +  exp(c_m) state c_m  +  d x_m
  state = exp(c_end) state + sum_k exp(c_end - c_k) dt_k x_k b_k^T

with c the running sum of a dt, in units of log 2. Every exponent is clipped from above
where a token must not be seen, and masked by what it multiplies.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd.tpu import pieces
from pallas_kernels.ssd.tpu.pieces import head_rows, matmul, sum_along, turned
from pallas_kernels.ssd.tpu.plan import CHUNK, Plan

# How many heads ahead of its matmuls a head's weights are made, and how many behind
# they are used. The compiler keeps to the order of the program, so the program has to
# leave room for latencies; these were best in compiled bundles on v5e and v6e.
_AHEAD, _BEHIND, _TILES_AHEAD = 4, 2, 1
_HUGE = 126.0  # 2**126 is finite, and finite times zero is zero.


class Chunk(NamedTuple):
    """What the heads of a chunk read: decays as rows [R L], maps as matrices."""

    total: jax.Array  # R L: the running sum of log decay.
    from_start: jax.Array  # R L: decay of the state before the chunk, at a token.
    to_end: jax.Array  # R L: weight of a token in the state after the chunk.
    across: jax.Array  # R S: decay of the whole chunk, the same in each lane.
    before: jax.Array  # L R: `total` less log dt, down the rows.
    scores: jax.Array  # L L: b_k . c_m; zero where m may not see k.
    b: jax.Array  # L S
    c: jax.Array  # S L


def _chunk_shapes(plan: Plan, dtype) -> Chunk:
    R, L, S = plan.heads, CHUNK, plan.state_dim
    shapes = [(R, L)] * 3 + [(R, S), (L, R), (L, L), (L, S), (S, L)]
    dtypes = [jnp.float32] * 6 + [dtype] * 2
    return Chunk(
        *(
            pltpu.VMEM((plan.chunks, *shape), kind)
            for shape, kind in zip(shapes, dtypes, strict=True)
        )
    )


def _prepare(t, refs, out: Chunk, plan: Plan, step, packed: bool):
    """Fills `out` for chunk t, in stages between which other work can stand.

    Behind the last block dt is zero, which leaves the state as it is.
    """
    dt_ref, starts_ref, a_ref, b_ref, c_ref = refs
    time = slice(t * CHUNK, (t + 1) * CHUNK)
    inside = step < plan.blocks
    seen = pieces.earlier_or_same()

    def map_rows(ref):
        first = step * plan.block + t * CHUNK
        return pieces.valid_rows(ref[0, time], first, plan.tokens, plan.ragged)

    dt = jnp.where(inside, dt_ref[0, 0, :, time], 0.0)
    total = sum_along(dt * a_ref[0], seen)
    if packed:
        starts = jnp.where(inside, starts_ref[0, :, time], 0.0)
        run = sum_along(jnp.broadcast_to(starts, (8, CHUNK)), seen)
    out.b[t] = map_rows(b_ref)
    out.c[t] = turned(map_rows(c_ref), out.c.dtype)
    yield
    out.total[t] = total
    out.before[t] = (total - jnp.log2(dt)).T
    if packed:
        run_down = run.T[:, :1]
    yield
    last = total[:, CHUNK - 1 :]
    from_start = jnp.exp2(total)
    to_end = jnp.exp2(last - total) * dt
    across = jnp.exp2(jnp.broadcast_to(last, (plan.heads, plan.state_dim)))
    if packed:
        run = run[:1]
        leaving = run[:, CHUNK - 1 :]
        from_start = jnp.where(run == 0, from_start, 0.0)
        to_end = jnp.where(run == leaving, to_end, 0.0)
        across = jnp.where(leaving == 0, across, 0.0)
        seen &= run == run_down
    out.from_start[t], out.to_end[t], out.across[t] = from_start, to_end, across
    scores = matmul(out.b[t], out.c[t])
    yield
    out.scores[t] = jnp.where(seen, scores, 0.0)


def _kernel(
    x_ref,
    dt_ref,
    starts_ref,
    a_ref,
    d_ref,
    b_ref,
    c_ref,
    first_state_ref,
    y_ref,
    state_ref,
    *rest,
    plan: Plan,
    packed: bool,
    blocks_per_save: int | None,
):
    saved_ref, rest = (rest[0], rest[1:]) if blocks_per_save else (None, rest)
    x_side, y_side, *chunk_refs = rest
    now, coming = Chunk(*chunk_refs[:8]), Chunk(*chunk_refs[8:])
    row, part, step = (pl.program_id(i) for i in range(3))
    state, dtype = state_ref.at[0], x_ref.dtype

    @pl.when(step == 1)
    def _():
        channels = pl.ds(part * plan.width, plan.width)
        pltpu.sync_copy(first_state_ref.at[row, channels], state)

    if blocks_per_save:

        @pl.when(((step - 1) % blocks_per_save == 0) & (step <= plan.blocks))
        def _():
            pltpu.sync_copy(state, saved_ref.at[0, 0])

    for held, next_held in zip(now, coming, strict=True):
        held[...] = next_held[...]

    def turn_in(t, tile):
        time = slice(t * CHUNK, (t + 1) * CHUNK)
        first = step * plan.block + t * CHUNK
        x = pieces.valid_rows(x_ref[0, time, tile], first, plan.tokens, plan.ragged)
        x_side[t, tile] = turned(x, jnp.float32)

    def turn_out(t, tile):
        time = slice(t * CHUNK, (t + 1) * CHUNK)
        y_ref[0, time, tile] = turned(y_side[t, tile], dtype)

    def weigh(t, h):
        exponent = now.total[t, h : h + 1] - now.before[t, :, h : h + 1]
        return (now.scores[t] * jnp.exp2(jnp.minimum(exponent, _HUGE))).astype(dtype)

    def multiply(t, h, weights):
        rows = head_rows(h, plan.head_dim)
        x = x_side[t, rows]
        inside = matmul(x.astype(dtype), weights)
        before = matmul(state[rows].astype(dtype), now.c[t])
        own = matmul((x * now.to_end[t, h : h + 1]).astype(dtype), now.b[t])
        return inside, before, own, x * d_ref[0, h : h + 1]

    def finish(t, h, inside, before, own, skip):
        rows = head_rows(h, plan.head_dim)
        y_side[t, rows] = inside + before * now.from_start[t, h : h + 1] + skip
        state[rows] = state[rows] * now.across[t, h : h + 1] + own

    sources = (dt_ref, starts_ref, a_ref, b_ref, c_ref)
    preparing = [
        _prepare(t, sources, coming, plan, step, packed) for t in range(plan.chunks)
    ]
    heads = [(t, h) for t in range(plan.chunks) for h in range(plan.heads)]
    tiles = [(t, tile) for t in range(plan.chunks) for tile in pieces.tiles(plan.width)]
    to_turn_in, to_turn_out = list(tiles), list(tiles)
    weights, products = {}, {}
    behind = min(_BEHIND, plan.heads - 1)  # The next chunk reads a finished state.

    def end_of(i):
        """Where head i ends, among all channels of all chunks."""
        t, h = heads[min(i, len(heads) - 1)]
        return t, (h + 1) * plan.head_dim

    for i in range(-_AHEAD, len(heads) + behind):
        for t, stages in enumerate(preparing):
            if i > t * plan.heads:
                next(stages, None)
        if i + _AHEAD < len(heads):
            weights[i + _AHEAD] = weigh(*heads[i + _AHEAD])
        if 0 <= i < len(heads):
            products[i] = multiply(*heads[i], weights.pop(i))
        # A tile of y leaves before a head writes there; one of x comes after it read.
        ahead = end_of(max(i - behind + _TILES_AHEAD, 0))
        while to_turn_out and (to_turn_out[0][0], to_turn_out[0][1].start) < ahead:
            turn_out(*to_turn_out.pop(0))
        if i >= behind:
            finish(*heads[i - behind], *products.pop(i - behind))
        while i >= 0 and to_turn_in:
            t, tile = to_turn_in[0]
            if (t, tile.stop) > end_of(i):
                break
            turn_in(*to_turn_in.pop(0))
    for stages in preparing:
        for _ in stages:
            pass


def run(
    x: jax.Array,
    dt: jax.Array,
    starts: jax.Array | None,
    a: jax.Array,
    d: jax.Array,
    b: jax.Array,
    c: jax.Array,
    first_state: jax.Array,
    plan: Plan,
    blocks_per_save: int | None = None,
) -> tuple[jax.Array, ...]:
    """Runs the kernel on x [B T N*P], dt rows [B X R T'], b and c [B T G*S].

    T' is T in whole blocks, and X counts groups and their parts. With `blocks_per_save`
    it also returns the state before each such number of blocks.
    """
    K, W, S = plan.blocks, plan.width, plan.state_dim
    R, parts = plan.heads, plan.parts
    packed = starts is not None
    if starts is None:
        starts = jnp.zeros((plan.batch, 1, plan.block), jnp.float32)
    block = lambda n: jnp.minimum(n, K - 1)
    starts_block = block if packed else lambda n: 0
    maps = pl.BlockSpec((1, plan.block, S), lambda i, g, n: (i, block(n), g // parts))
    per_head = pl.BlockSpec((1, R, pieces.LANES), lambda i, g, n: (g, 0, 0))
    in_specs = [
        pl.BlockSpec((1, plan.block, W), lambda i, g, n: (i, block(n), g)),
        pl.BlockSpec((1, 1, R, plan.block), lambda i, g, n: (i, g, 0, block(n))),
        pl.BlockSpec((1, 1, plan.block), lambda i, g, n: (i, 0, starts_block(n))),
        per_head,
        per_head,
        maps,
        maps,
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    out_specs = [
        pl.BlockSpec((1, plan.block, W), lambda i, g, n: (i, jnp.maximum(n - 2, 0), g)),
        pl.BlockSpec((1, W, S), lambda i, g, n: (i, g, 0)),
    ]
    out_shape = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct(first_state.shape, jnp.float32),
    ]
    if blocks_per_save:
        saves = -(-K // blocks_per_save)
        save = lambda n: jnp.clip((n - 1) // blocks_per_save, 0, saves - 1)
        out_specs += [pl.BlockSpec((1, 1, W, S), lambda i, g, n: (i, save(n), g, 0))]
        shape = (plan.batch, saves, *first_state.shape[1:])
        out_shape += [jax.ShapeDtypeStruct(shape, jnp.float32)]
    side = pltpu.VMEM((plan.chunks, W, CHUNK), jnp.float32)
    chunk = _chunk_shapes(plan, x.dtype)
    return pl.pallas_call(
        functools.partial(
            _kernel, plan=plan, packed=packed, blocks_per_save=blocks_per_save
        ),
        grid=(plan.batch, plan.groups * parts, K + 2),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[side, side, *chunk, *chunk],
        interpret=plan.interpret,
        name="ssd_forward",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=48 << 20,
        ),
    )(x, dt, starts, a, d, b, c, first_state)
