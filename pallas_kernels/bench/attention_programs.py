"""The attention that is compiled: causal, over a row of packed samples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attention, blocks, splash_tpu
from pallas_kernels.bench.programs import Program


class Shape(NamedTuple):
    """Sizes of an attention."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    tile: tuple[int, int] | None = None  # Queries, keys; chosen from the table.


NANO_9B = Shape(32768, 40, 8, 128)
FORWARD = "splash_mha_fwd_segmented_no_residuals"
BACKWARD = ("splash_mha_dq_segmented", "splash_mha_dkv_segmented")


def forward(shape: Shape) -> Program:
    """Attention of packed samples."""
    T, N, K, H, dtype, _ = shape

    def run(q, k, v, segment_ids):
        return attention(
            *(q, k, v),
            causal=True,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            implementation="splash_tpu",
        )

    inputs = {
        "q": jax.ShapeDtypeStruct((1, T, N, H), dtype),
        "k": jax.ShapeDtypeStruct((1, T, K, H), dtype),
        "v": jax.ShapeDtypeStruct((1, T, K, H), dtype),
        "segment_ids": jax.ShapeDtypeStruct((1, T), jnp.int32),
    }
    sizes = blocks.choose(T, T, H)
    executions = {FORWARD: N * _visited(T, *sizes.forward)}
    return Program(run, inputs, executions, (FORWARD,), _matmuls(shape, 2))


def backward(shape: Shape) -> Program:
    """The same with the gradients of q, k and v: five matmuls where forward has two."""
    run, inputs, *_ = forward(shape)

    def with_gradients(segment_ids, dy, **arrays):
        out, pull = jax.vjp(lambda z: run(**z, segment_ids=segment_ids), arrays)
        return out, pull(dy)

    T, N, _, H, *_ = shape
    sizes = blocks.choose(T, T, H)
    tiles = zip(BACKWARD, (sizes.dq, sizes.dkv), strict=True)
    executions = {kernel: N * _visited(T, *tile) for kernel, tile in tiles}
    inputs = inputs | {"dy": inputs["q"]}
    return Program(with_gradients, inputs, executions, BACKWARD, _matmuls(shape, 5))


def one_tile(shape: Shape) -> Program:
    """Forward and backward in tiles of one size; a visit of each kernel is counted."""
    _, inputs, *_ = backward(shape)
    sizes = blocks.Blocks(*3 * [tuple(shape.tile)], *shape.tile)

    def run(segment_ids, dy, **arrays):
        def packed(arrays):
            return splash_tpu.attention(
                **arrays,
                causal=True,
                q_segment_ids=segment_ids,
                kv_segment_ids=segment_ids,
                kv_mask=None,
                q_offset=0,
                kv_length=shape.tokens,
                scale=1.0,
                sizes=sizes,
            )

        out, pull = jax.vjp(packed, arrays)
        return out, pull(dy)

    kernels = ("splash_mha_fwd_segmented_residuals", *BACKWARD)
    return Program(run, inputs, dict.fromkeys(kernels, 1), kernels)


DIRECTIONS = {"forward": forward, "backward": backward, "tile": one_tile}


def _visited(T: int, block_q: int, block_kv: int) -> int:
    """Tiles that causality leaves, if the row is one sample."""
    T = -(-T // max(block_q, block_kv)) * max(block_q, block_kv)
    return sum(-(-(end + 1) // block_kv) for end in range(block_q - 1, T, block_q))


def _matmuls(shape: Shape, count: int) -> float:
    """Floating point operations of matmuls over the pairs that causality leaves."""
    T, N, _, H, *_ = shape
    return count * 2 * N * H * T * (T + 1) / 2
