"""SSD on TPU: two Pallas kernels, and what XLA does around them.

`tpu/forward.py` has the picture. The arrays go in as the model holds them; only dt is
transposed (2 % of the bytes). On CPU the kernels are interpreted, for tests.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.platform import require_local, target_device_kind, target_platform
from pallas_kernels.ssd.tpu import backward, forward, pieces, plan
from pallas_kernels.ssd.tpu.plan import Plan


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
    require_local("pallas_tpu")
    if not x.dtype == b.dtype == c.dtype:
        raise NotImplementedError(
            f"x, b and c must be of one dtype: {x.dtype}, {b.dtype}, {c.dtype}."
        )
    B, T, N, P = x.shape
    wide = lambda z: z.astype(jnp.float32)
    y, state = _ssd(
        x.reshape(B, T, N * P),
        wide(dt),
        wide(a),
        b.reshape(B, T, -1),
        c.reshape(B, T, -1),
        wide(d),
        wide(initial_state).reshape(B, N * P, -1),
        starts,
        sizes,
    )
    return y.reshape(x.shape), state.reshape(initial_state.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _ssd(x, dt, a, b, c, d, state, starts, sizes: Plan):
    return _run(x, dt, a, b, c, d, state, starts, sizes)


def _run(x, dt, a, b, c, d, state, starts, sizes: Plan, save: bool = False):
    sizes = plan.of_forward(sizes, target_device_kind())
    rows, starts, per_head = _arranged(dt, starts, a, d, sizes)
    blocks_per_save = sizes.blocks_per_span if save else None
    return forward.run(x, rows, starts, *per_head, b, c, state, sizes, blocks_per_save)


def _arranged(dt, starts, a, d, sizes: Plan):
    """What is small, in the kernels' layout: decay rates in units of log 2."""
    starts = None if starts is None else _padded(starts, sizes)[:, None]
    per_head = (a * math.log2(math.e), d)
    return _rows(dt, sizes), starts, [pieces.lanes_of(z, sizes) for z in per_head]


def _rows(dt: Float[Array, "B T N"], sizes: Plan) -> Float[Array, "B X R T2"]:
    """Time along the lanes, padded to whole blocks with dt = 0."""
    shape = (sizes.batch, -1, sizes.heads, sizes.blocks * sizes.block)
    return jnp.swapaxes(_padded(dt, sizes), 1, 2).reshape(shape)


def _padded(z: Array, sizes: Plan) -> Float[Array, "B T2 ..."]:
    rest = [(0, 0)] * (z.ndim - 2)
    behind = sizes.blocks * sizes.block - sizes.tokens
    return jnp.pad(z.astype(jnp.float32), [(0, 0), (0, behind), *rest])


def _forward(x, dt, a, b, c, d, state, starts, sizes: Plan):
    y, last, saved = _run(x, dt, a, b, c, d, state, starts, sizes, save=True)
    return (y, last), (x, dt, a, b, c, d, starts, saved)


def _backward(sizes: Plan, residuals, cotangents):
    x, dt, a, b, c, d, starts, saved = residuals
    dy, dlast = cotangents
    sizes = plan.of_backward(sizes)
    rows, starts, per_head = _arranged(dt, starts, a, d, sizes)
    out = backward.run(x, dy, rows, starts, *per_head, b, c, saved, dlast, sizes)
    ddt = out.ddt.reshape(sizes.batch, a.size, -1)[..., : sizes.tokens]
    return (
        out.dx,
        jnp.swapaxes(ddt, 1, 2),
        out.da.sum((0, 3)).reshape(a.shape),
        out.db.sum(0).astype(b.dtype),
        out.dc.sum(0).astype(c.dtype),
        out.dd.sum((0, 3)).reshape(d.shape),
        out.dstate,
        None,
    )


_ssd.defvjp(_forward, _backward)
