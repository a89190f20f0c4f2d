"""What the GPU kernels share: loads by parts, matmuls, decay, and blocks of arrays.

Triton's tiles have sides that are powers of two. A head of 80 channels is therefore two
parts, of 64 and of 16: a mask over 128 would waste three eighths of registers, shared
memory and matmuls.

A grid has a tile of a chunk first, then a head (or a group), then a chunk of a row of
the batch: programs that run together then share b, c and whole lines of x.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.platform import target_platform
from pallas_kernels.ssd.gpu.plan import Plan


def over_parts(a: list[Array], b: list[Array]) -> Float[Array, "I J"]:
    """a b^T, contracted over a head's channels, which come in parts."""
    return sum(matmul(*pair, (1, 1)) for pair in zip(a, b, strict=True))


def matmul_with_ones(
    a: Float[Array, "I K"], mask: Bool[Array, "K J"], dtype: jnp.dtype
) -> Float[Array, "I J"]:
    """a in float32 by a 0/1 matrix; of bfloat16 it takes two to hold 16 bits of a."""
    ones = mask.astype(dtype)
    high = a.astype(dtype)
    if dtype == jnp.float32:
        return matmul(high, ones)
    low = (a - high.astype(jnp.float32)).astype(dtype)
    return matmul(low, ones) + matmul(high, ones)


class Token(NamedTuple):
    """Tokens of a tile, as far as decay between two of them goes."""

    log_decay: Float[Array, "*L"]  # Since the chunk's start, in units of log 2.
    run: Int[Array, "*L"]  # Counts the segments that have begun in the chunk.
    position: Int[Array, "*L"]  # In the chunk.


def call(kernel: Callable, plan: Plan, **options):
    """A `pallas_call` on Triton that goes by the kernel's own name."""
    named = functools.wraps(kernel)(functools.partial(kernel, plan=plan))
    parameters = plgpu.CompilerParams(num_warps=plan.warps, num_stages=2)
    return pl.pallas_call(
        named,
        name=kernel.__name__,
        interpret=plan.interpret,
        compiler_params=parameters,
        **options,
    )


def matmul(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Float[Array, "I J"]:
    """a and b contracted over `axes`, in float32; float32 operands are not rounded."""
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _precision(dtype: jnp.dtype):
    """Tensor cores multiply float32 as three products of TF32: all but 2 of 24 bits.

    The other units do it exactly, but Triton's code for them spills registers by tens
    of kilobytes.
    """
    if dtype != jnp.float32:
        return None
    if target_platform() == "cpu":
        return lax.Precision.HIGHEST
    return lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def program_tile() -> Int[Array, ""]:
    """The tile of the chunk that this program is about."""
    return pl.program_id(0)


def program_pair(plan: Plan) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The late and the early tile that this program is about."""
    return _pair(pl.program_id(0), plan)


def _pair(i, plan: Plan):
    return lax.div(i, plan.tiles), lax.rem(i, plan.tiles)


def rows_of(tile: Int[Array, ""] | int, plan: Plan) -> pl.Slice:
    """The tokens of a tile, within its chunk."""
    return pl.ds(pl.multiple_of(tile * plan.tile, plan.tile), plan.tile)


def positions(tile: Int[Array, ""] | int, plan: Plan) -> Int[Array, "L"]:
    """The tokens of a tile, counted from the start of its chunk."""
    return tile * plan.tile + lax.iota(jnp.int32, plan.tile)


def channel_parts(plan: Plan) -> list[pl.Slice]:
    """Cuts a head's channels into powers of two, the largest first."""
    return _parts(plan.head_dim, plan)


def state_parts(plan: Plan) -> list[pl.Slice]:
    """Cuts the state's dimension for matmuls that sum over it."""
    return _parts(plan.state_dim, plan)


def _parts(width: int, plan: Plan) -> list[pl.Slice]:
    slices, start = [], 0
    while start < width:
        size = min(plan.part, 1 << (width - start).bit_length() - 1)
        slices.append(pl.ds(start, size))
        start += size
    return slices


def validity(plan: Plan) -> Callable:
    """A function of a tile: which of its tokens there are; None where all are."""
    if not plan.padding:
        return lambda tile: None
    chunk = lax.rem(pl.program_id(2), plan.chunks)
    left = plan.tokens - chunk * plan.chunk
    return lambda tile: (positions(tile, plan) < left)[:, None]


def load(ref, index: tuple, there: Bool[Array, "L 1"] | None) -> Float[Array, "L X"]:
    """Rows of a block; zeros behind the last token, where anything may be."""
    if there is None:
        return ref[index]
    return plgpu.load(ref.at[index], mask=there, other=0)


def store(ref, index: tuple, values, there: Bool[Array, "L 1"] | None) -> None:
    """Rows of a block, except behind the last token."""
    values = values.astype(ref.dtype)
    if there is None:
        ref[index] = values
    else:
        plgpu.store(ref.at[index], values, mask=there)


def load_channels(ref, tile, plan: Plan, there, head: tuple = ()) -> list[Array]:
    """A tile of one head of x [L P] or [L R P], in parts."""
    rows = rows_of(tile, plan)
    return [load(ref, (rows, *head, p), there) for p in channel_parts(plan)]


def load_map_parts(ref, tile, plan: Plan, there) -> list[Array]:
    """A tile of b or c in parts: a matmul over all of it would not fit registers."""
    index = rows_of(tile, plan)
    return [load(ref, (index, p), there) for p in state_parts(plan)]


def read(maps: list[Array], state_ref, plan: Plan) -> tuple[Array, ...]:
    """What b or c, in parts, read of a state S x P: a head's channels, in parts."""
    inner = list(zip(maps, state_parts(plan), strict=True))
    return tuple(
        sum(matmul(z, state_ref[rows, part]) for z, rows in inner)
        for part in channel_parts(plan)
    )


def load_maps(ref, tile, plan: Plan, there) -> Float[Array, "L S"]:
    """A tile of b or c."""
    return load(ref, (rows_of(tile, plan), slice(None)), there)


def token(tile, plan: Plan, log_decay_ref, run_ref, head: tuple = ()) -> Token:
    """What decides on the decay between a tile's tokens and others'."""
    rows = rows_of(tile, plan)
    return Token(log_decay_ref[(*head, rows)], run_ref[rows], positions(tile, plan))


def scaled(z: Array, weight: Float[Array, "L"]) -> Array:
    """Rows times their weights, rounded once."""
    return (z * weight[:, None]).astype(z.dtype)


def decay(late: Token, early: Token, late_axis: int = 0) -> Float[Array, "L L"]:
    """What is left of the early token at the late one; zero where it may not see it.

    The late tokens lie along `late_axis`.
    """
    late = Token(*(jnp.expand_dims(z, 1 - late_axis) for z in late))
    early = Token(*(jnp.expand_dims(z, late_axis) for z in early))
    seen = (late.run == early.run) & (late.position >= early.position)
    exponent = jnp.minimum(late.log_decay - early.log_decay, 0)
    return jnp.where(seen, jnp.exp2(exponent), 0)


def _batch_chunk(z, plan: Plan):
    return lax.div(z, plan.chunks), lax.rem(z, plan.chunks)


def _spec(block: tuple, index: Callable, plan: Plan) -> pl.BlockSpec:
    """`index` maps (tile, head or group, row of the batch, chunk) to a block."""
    return pl.BlockSpec(block, lambda i, n, z: index(i, n, *_batch_chunk(z, plan)))


def channels(plan: Plan) -> pl.BlockSpec:
    """A head's chunk of x [B T N P]."""
    block = (None, plan.chunk, None, plan.head_dim)
    return _spec(block, lambda i, n, b, j: (b, j, n, 0), plan)


def channels_of_tile(plan: Plan) -> pl.BlockSpec:
    """A head's tile of x [B T N P]."""
    block = (None, plan.tile, None, plan.head_dim)
    return _spec(block, lambda i, n, b, j: (b, j * plan.tiles + i, n, 0), plan)


def maps(plan: Plan) -> pl.BlockSpec:
    """A head's chunk of b or c [B T G S]."""
    block = (None, plan.chunk, None, plan.state_dim)
    index = lambda i, n, b, j: (b, j, lax.div(n, plan.heads_per_group), 0)
    return _spec(block, index, plan)


def rows(plan: Plan) -> pl.BlockSpec:
    """A head's chunk of one number a token [B N C L]."""
    block = (None, None, None, plan.chunk)
    return _spec(block, lambda i, n, b, j: (b, n, j, 0), plan)


def rows_of_tile(plan: Plan) -> pl.BlockSpec:
    """A head's tile of one number a token [B N C L]."""
    return _spec((None, None, None, plan.tile), lambda i, n, b, j: (b, n, j, i), plan)


def runs(plan: Plan) -> pl.BlockSpec:
    """A chunk of the runs [B C L]."""
    return _spec((None, None, plan.chunk), lambda i, n, b, j: (b, j, 0), plan)


def state(plan: Plan) -> pl.BlockSpec:
    """A head's state at one edge of a chunk [B N C S P]."""
    block = (None, None, None, plan.state_dim, plan.head_dim)
    return _spec(block, lambda i, n, b, j: (b, n, j, 0, 0), plan)


def channels_of_group(plan: Plan) -> pl.BlockSpec:
    """A chunk of all heads of a group of x [B T N P]."""
    block = (None, plan.chunk, plan.heads_per_group, plan.head_dim)
    return _spec(block, lambda i, g, b, j: (b, j, g, 0), plan)


def maps_of_group(plan: Plan) -> pl.BlockSpec:
    """A group's chunk of b or c [B T G S]."""
    block = (None, plan.chunk, None, plan.state_dim)
    return _spec(block, lambda i, g, b, j: (b, j, g, 0), plan)


def maps_of_tile(plan: Plan) -> pl.BlockSpec:
    """A group's tile of b or c [B T G S]."""
    block = (None, plan.tile, None, plan.state_dim)
    return _spec(block, lambda i, g, b, j: (b, j * plan.tiles + i, g, 0), plan)


def rows_of_group(plan: Plan) -> pl.BlockSpec:
    """A chunk of all heads of a group of one number a token [B N C L]."""
    block = (None, plan.heads_per_group, None, plan.chunk)
    return _spec(block, lambda i, g, b, j: (b, g, j, 0), plan)


def state_of_group(plan: Plan) -> pl.BlockSpec:
    """The states of all heads of a group at one edge of a chunk [B N C S P]."""
    sizes = (plan.state_dim, plan.head_dim)
    block = (None, plan.heads_per_group, None, *sizes)
    return _spec(block, lambda i, g, b, j: (b, g, j, 0, 0), plan)


def pairs(plan: Plan) -> pl.BlockSpec:
    """All pairs of tokens of a group's chunk [B C G L L]."""
    block = (None, None, None, plan.chunk, plan.chunk)
    return _spec(block, lambda i, g, b, j: (b, j, g, 0, 0), plan)


def pair(plan: Plan) -> pl.BlockSpec:
    """A tile of such pairs, late tokens by early ones."""
    index = lambda i, g, b, j: (b, j, g, *_pair(i, plan))
    return _spec((None, None, None, plan.tile, plan.tile), index, plan)


def sums_of_pair(plan: Plan, *, late: bool) -> pl.BlockSpec:
    """For tokens of one tile of a pair and the other tile, all heads [B N C I L]."""

    def index(i, g, b, j):
        one, other = _pair(i, plan)
        return b, g, j, *((other, one) if late else (one, other))

    return _spec((None, plan.heads_per_group, None, None, plan.tile), index, plan)


def per_tile(plan: Plan) -> pl.BlockSpec:
    """One number a tile [B N C I]."""
    return _spec((None, None, None, 1), lambda i, n, b, j: (b, n, j, i), plan)


def per_head() -> pl.BlockSpec:
    """One number a head [N]."""
    return pl.BlockSpec((1,), lambda i, n, z: (n,))


def grid(plan: Plan, *, tiles: int, groups: bool = False) -> tuple[int, int, int]:
    """Tiles of a chunk, heads or groups, chunks of the whole batch."""
    return tiles, plan.groups if groups else plan.heads, plan.batch * plan.chunks


def zeros(rows: int, plan: Plan) -> tuple[Array, ...]:
    """An accumulator for a head's channels, in parts."""
    return tuple(jnp.zeros((rows, p.size), jnp.float32) for p in channel_parts(plan))


def struct(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """An output's shape; float32 where nothing is said."""
    return jax.ShapeDtypeStruct(shape, dtype)
