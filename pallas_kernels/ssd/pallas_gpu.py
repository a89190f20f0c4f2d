"""SSD on GPU: Pallas kernels on Triton, parallel over chunks.

Forwards: what every chunk adds to the state, a scan that sums it up, then all outputs
at once. Backwards: the same two steps with the states' cotangents, then all gradients.
On CPU the kernels are interpreted, for tests.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.platform import require_local, target_platform
from pallas_kernels.ssd.gpu import backward, output, plan, rows, states
from pallas_kernels.ssd.gpu.plan import Plan


def ssd(
    x: Float[Array, "B T N P"],
    dt: Float[Array, "B T N"],
    a: Float[Array, "N"],
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    d: Float[Array, "N"],
    initial_state: Float[Array, "B N P S"],
    starts: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N P S"]]:
    """See `api.ssd`; x, b and c in bfloat16, or all in float32."""
    sizes = plan.make(x, b, target_platform())
    require_local("pallas_gpu")
    if not x.dtype == b.dtype == c.dtype:
        raise NotImplementedError(
            f"x, b and c must be of one dtype: {x.dtype}, {b.dtype}, {c.dtype}."
        )
    dt, a, d, state = (z.astype(jnp.float32) for z in (dt, a, d, initial_state))
    y, last = _ssd(x, dt, a, b, c, d, jnp.swapaxes(state, 2, 3), starts, sizes)
    return y, jnp.swapaxes(last, 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _ssd(x, dt, a, b, c, d, state, starts, sizes: Plan):
    return _forward(x, dt, a, b, c, d, state, starts, sizes)[0]


def _forward(x, dt, a, b, c, d, state, starts, sizes: Plan):
    row = rows.make(dt, a, starts, sizes)
    own = states.of_chunks(x, b, row.dt * row.to_end, sizes)
    before, last = states.scan(state, row.across, own, x.dtype, sizes)
    y = output.run(x, row, b, c, d, before, sizes)
    return (y, last), (x, dt, a, b, c, d, starts, before)


def _backward(sizes: Plan, residuals, cotangents):
    x, dt, a, b, c, d, starts, before = residuals
    dy, dlast = cotangents
    row = rows.make(dt, a, starts, sizes)
    own = states.of_chunks(dy, c, row.from_start, sizes)
    after, dstate, across = states.scan_back(dlast, row.across, own, before, sizes)
    dx, direct, dd = backward.of_channels(x, dy, row, b, c, d, after, sizes)
    pairs = backward.of_pairs(x, dy, row, b, c, sizes)
    dc, from_start = backward.of_maps(
        dy, row.from_start, c, b, before, pairs.scores, sizes, late=True
    )
    db, to_end = backward.of_maps(
        x, row.dt * row.to_end, b, c, after, pairs.scores, sizes, late=False
    )
    dlog_decay = rows.dlog_decay(
        pairs.by_late, pairs.by_early, from_start, to_end, across, sizes
    )
    ddt = rows.join(direct + a[:, None, None] * dlog_decay, sizes)
    da = jnp.sum(row.dt * dlog_decay, axis=(0, 2, 3))
    return dx, ddt, da, db, dc, jnp.sum(dd, axis=(0, 2, 3)), dstate, None


_ssd.defvjp(_forward, _backward)
