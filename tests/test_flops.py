"""Counted by hand, and by the counter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.attention import attention
from timeviper_jax import flops

SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
PRODUCT = 2 * 4 * 4 * 4  # Of two squares.
NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


def count(f, *args, values=None):
    return flops.count(jax.jit(f).trace(*args).jaxpr, values)


def test_a_product_counts_two_for_a_multiply_and_add():
    a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in [(2, 3, 5), (2, 5, 7)])
    assert count(jnp.matmul, a, b) == (2 * 2 * 3 * 5 * 7, True)


def test_a_convolution_counts_its_window_and_the_channels_of_its_group():
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in [(1, 8, 10), (6, 4, 3)])
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1,),
        padding="VALID",
        feature_group_count=2,
    )
    assert count(conv, x, w) == (2 * (6 * 8) * (4 * 3), True)


def test_a_scan_counts_its_body_once_an_iteration_and_what_it_wraps():
    body = jax.checkpoint(jax.jit(lambda x, _: (x @ x, None)))
    run = lambda x: jax.lax.scan(body, x, length=9)[0]
    assert count(run, SQUARE) == (9 * PRODUCT, True)


def test_a_rolled_stack_counts_the_branch_of_each_layer():
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]

    def run(x):
        step = lambda x, kind: (jax.lax.switch(kind, branches, x), None)
        return jax.lax.scan(step, x, jnp.array([2, 0, 1, 2, 1]))[0]

    assert count(run, SQUARE) == ((2 + 0 + 1 + 2 + 1) * PRODUCT, True)


def test_a_branch_that_is_not_known_counts_as_the_dearest():
    run = lambda x, i: jax.lax.switch(i, [lambda x: x, lambda x: x @ x], x)
    assert count(run, SQUARE, NUMBER) == (PRODUCT, False)
    assert count(run, SQUARE, NUMBER, values=[None, 0]) == (0, True)


def test_a_loop_counts_as_often_as_its_end_says():
    run = lambda x, n: jax.lax.fori_loop(0, 2 * n + 1, lambda i, x: x @ x, x)
    assert count(run, SQUARE, NUMBER, values=[None, 3]) == (7 * PRODUCT, True)
    assert count(run, SQUARE, NUMBER) == (PRODUCT, False)


def test_a_loop_inside_a_loop_counts_each_of_its_ends():
    def run(x):
        inner = lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)
        return jax.lax.scan(lambda x, n: (inner(x, n), None), x, jnp.arange(5))[0]

    assert count(run, SQUARE) == ((0 + 1 + 2 + 3 + 4) * PRODUCT, True)


def test_a_kernel_counts_once_a_point_of_its_grid():
    def kernel(x, y):
        y[...] = x[...] @ x[...]

    def run(x):
        block = pl.BlockSpec((4, 4), lambda i, j: (0, 0))
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((4, 4), jnp.float32),
            grid=(3, 5),
            in_specs=[block],
            out_specs=block,
            interpret=True,
        )(x)

    assert count(run, SQUARE) == (3 * 5 * PRODUCT, True)


@pytest.mark.parametrize("offset, tiles", [(0, 1), (512, 1), (1024, 2), (1536, 2)])
def test_splash_attention_counts_the_tiles_it_visits(offset, tiles):
    """512 queries at an offset into a cache of 2,048, in tiles of 512 by 1,024."""

    def run(q, k, v, offset):
        return attention(
            q,
            k,
            v,
            causal=True,
            q_offset=offset,
            kv_length=offset + 512,
            implementation="splash_tpu",
        )

    of = lambda tokens, heads: jax.ShapeDtypeStruct((1, tokens, heads, 128), "bfloat16")
    arrays = of(512, 4), of(2048, 2), of(2048, 2)
    found = count(run, *arrays, NUMBER, values=[None, None, None, offset])
    one_tile = 2 * 2 * 4 * 512 * 1024 * 128
    assert found == (tiles * one_tile, True)


def test_a_shard_counts_what_its_device_does():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")

    def one(x):
        return jax.lax.psum(x @ x, "x") * jax.lax.axis_index("x")

    run = jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec)
    assert count(run, SQUARE, values=[np.eye(4)]) == (PRODUCT, True)
