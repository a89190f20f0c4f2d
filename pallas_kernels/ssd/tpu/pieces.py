"""What the forward and the backward kernel share: decay, and turning tiles.

Inside a kernel everything lies on its side: channels and heads run down the rows and
time runs along the lanes. A head is then a slice of rows, which costs nothing for any
width that registers divide, and a decay in time is a row that broadcasts down for free.
The price is turning x on the way in and y on the way out, tile by tile.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.ssd.tpu.plan import CHUNK, LANES


def matmul(a, b, turn_b: bool = False) -> Float[Array, "I J"]:
    """a @ b, or a @ b.T, in float32; float32 operands are not rounded to bfloat16."""
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((1,), (int(turn_b),)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def turned(tile: Array, dtype) -> Array:
    """The transpose of a tile. In 32 bits: the hardware packs the narrower itself."""
    return tile.astype(jnp.float32).T.astype(dtype)


def earlier_or_same() -> Bool[Array, "L L"]:
    """True where the row's token comes no later than the lane's."""
    row, lane = _positions()
    return row <= lane


def later_or_same() -> Bool[Array, "L L"]:
    """True where the row's token comes no earlier than the lane's."""
    row, lane = _positions()
    return row >= lane


def _positions() -> tuple[Int[Array, "L L"], ...]:
    shape = (CHUNK, CHUNK)
    return tuple(lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def sum_along(rows: Float[Array, "I L"], mask: Bool[Array, "L L"]) -> Array:
    """Matmul of float32 rows with a 0/1 matrix, exact to float32.

    A matmul takes bfloat16; three of them hold all 24 bits of a float32.
    """

    def top_bits(z):
        bits = lax.bitcast_convert_type(z, jnp.int32) & jnp.int32(-65536)
        return lax.bitcast_convert_type(bits, jnp.float32)

    high = top_bits(rows)
    middle = top_bits(rows - high)
    parts = jnp.concatenate([high, middle, rows - high - middle])
    # By way of float32: masks do not convert to 16 bits directly.
    ones = mask.astype(jnp.float32).astype(jnp.bfloat16)
    high, middle, low = jnp.split(matmul(parts.astype(jnp.bfloat16), ones), 3)
    return low + middle + high


def tiles(width: int) -> list[slice]:
    """Cuts `width` channels into registers' widths; the last may be narrower."""
    return [slice(i, min(i + LANES, width)) for i in range(0, width, LANES)]


def head_rows(head: int, head_dim: int) -> slice:
    """The rows of one head."""
    return slice(head * head_dim, (head + 1) * head_dim)


def valid_rows(tile: Array, first: Array, tokens: int, ragged: bool) -> Array:
    """Zeros behind the last token, where a block holds whatever was there."""
    if not ragged:
        return tile
    row = first + lax.broadcasted_iota(jnp.int32, (CHUNK, 1), 0)
    return jnp.where(row < tokens, tile, jnp.zeros_like(tile))


def lanes_of(rows: Float[Array, "N"], plan) -> Float[Array, "X R L"]:
    """One number a head as full rows, which broadcast down without a shuffle."""
    shape = (plan.groups * plan.parts, plan.heads, 1)
    return jnp.broadcast_to(rows.reshape(shape), (*shape[:2], LANES))
