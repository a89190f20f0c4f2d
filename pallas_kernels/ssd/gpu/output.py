"""The outputs of a chunk, once the state before it is known."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.ssd.gpu import pieces
from pallas_kernels.ssd.gpu.plan import Plan
from pallas_kernels.ssd.gpu.rows import Rows


def run(
    x: Float[Array, "B T N P"],
    rows: Rows,
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    d: Float[Array, "N"],
    states: Float[Array, "B N C S P"],
    plan: Plan,
) -> Float[Array, "B T N P"]:
    """y, from the states before every chunk."""
    row = pieces.rows(plan)
    return pieces.call(
        ssd_gpu_output,
        plan,
        grid=pieces.grid(plan, tiles=plan.tiles),
        in_specs=[
            *(pieces.channels(plan), pieces.maps(plan), pieces.maps(plan)),
            *(row, row, row, pieces.runs(plan)),
            *(pieces.per_head(), pieces.state(plan)),
        ],
        out_specs=pieces.channels_of_tile(plan),
        out_shape=pieces.struct(x.shape, x.dtype),
    )(x, b, c, rows.dt, rows.log_decay, rows.from_start, rows.run, d, states)


def ssd_gpu_output(
    x_ref,
    b_ref,
    c_ref,
    dt_ref,
    log_decay_ref,
    from_start_ref,
    run_ref,
    d_ref,
    state_ref,
    y_ref,
    *,
    plan: Plan,
):
    """One tile of one head: the state that enters, then the tiles up to its own."""
    own, valid = pieces.program_tile(), pieces.validity(plan)
    there = valid(own)
    token = lambda tile: pieces.token(tile, plan, log_decay_ref, run_ref)
    late = token(own)
    load_c = lambda: pieces.load_map_parts(c_ref, own, plan, there)
    c = load_c()
    from_start = from_start_ref[pieces.rows_of(own, plan)][:, None]

    def one_tile(tile, sums):
        there = valid(tile)
        b = pieces.load_map_parts(b_ref, tile, plan, there)
        # Kept in two parts through the loop, float32 would not fit registers.
        scores = pieces.over_parts(c if plan.narrow else load_c(), b)
        weight = scores * pieces.decay(late, token(tile))
        weight *= dt_ref[pieces.rows_of(tile, plan)][None, :]
        x = pieces.load_channels(x_ref, tile, plan, there)
        return tuple(
            s + pieces.matmul(weight.astype(z.dtype), z)
            for s, z in zip(sums, x, strict=True)
        )

    entering = tuple(z * from_start for z in pieces.read(c, state_ref, plan))
    sums = lax.fori_loop(0, own + 1, one_tile, entering)
    x = pieces.load_channels(x_ref, own, plan, there)
    for part, s, z in zip(pieces.channel_parts(plan), sums, x, strict=True):
        y = s + d_ref[0] * z.astype(jnp.float32)
        pieces.store(y_ref, (slice(None), part), y, there)
