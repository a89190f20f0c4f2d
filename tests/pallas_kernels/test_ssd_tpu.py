"""The TPU kernels of the SSD, interpreted: the recurrence, values and gradients.

Shapes are the smallest that have two blocks of time, a ragged end, two groups and
heads that lie across registers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from ssd_cases import assert_right, make_inputs, narrow, run

from pallas_kernels.ssd import pallas_tpu
from pallas_kernels.ssd.tpu import plan

T, N, P, G, S = 300, 4, 64, 2, 128
CHIP = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")


def _inputs(T=T, N=N, P=P, G=G, S=S, B=1):
    return make_inputs(T, N, P, G, S, B)


def _segments(T=T):
    """Ends in mid-chunk, at a chunk's edge, after one token; spans an edge; padding."""
    lengths = [3, 1, 124, 60, 72, 5, T]
    return np.repeat([1, 2, 3, 4, 9, 5, 0], lengths)[None, :T]


_assert_right = functools.partial(assert_right, "pallas_tpu")


def test_packed_and_ragged_in_float32():
    _assert_right(_inputs(), 5e-6, _segments())


def test_bfloat16_with_heads_across_registers():
    # Rounding of weights and state for the matmuls: 2.5e-3 at most has been seen.
    _assert_right(_inputs(T=140, N=2, P=80, G=1, S=16, B=2), 6e-3, dtype=jnp.bfloat16)


@pytest.mark.parametrize("T", [1, 128])
def test_short_sequences(T):
    _assert_right(_inputs(T=T, N=2, P=16, G=1, S=16), 5e-6)


@pytest.mark.slow
def test_long_sequences_take_four_chunks_a_step(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "target_device_kind", lambda: "TPU v6 lite")
    _assert_right(_inputs(T=2300, N=2, P=16, G=1, S=16), 5e-6, _segments(2300))


def test_strong_decay_neither_overflows_nor_loses_the_gradient():
    # Every other token all but empties the state: the sum reaches -2e5 in a chunk.
    inputs = _inputs(T=140, N=2, P=16, G=1, S=16)
    inputs["a"][:] = -100
    strong = np.arange(140)[:, None] % 2
    inputs["dt"] = np.where(strong, 4, 1e-3) * (inputs["dt"] + 0.5)
    # Where float32 is exact to 1e-2 of an exponent.
    _assert_right(inputs, 2e-2)


def test_zero_and_tiny_steps():
    inputs = _inputs(T=140, N=2, P=16, G=1, S=16)
    inputs["dt"][:, 2:9] = 0
    inputs["dt"][:, 9:20] = 1e-30
    _assert_right(inputs, 5e-6)


def _lowered(implementation, shape=(1, T, N, P, G, S), dtype=jnp.bfloat16):
    """The text of the program for a TPU, which holds the kernels by name."""
    B, T, N, P, G, S = shape
    arrays = narrow(_inputs(T, N, P, G, S, B), dtype)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=CHIP)):
        program = functools.partial(run, implementation=implementation)
        traced = jax.jit(program).trace(arrays, None)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


def test_the_kernel_is_the_automatic_choice_on_tpu():
    for implementation in (None, "pallas_tpu"):
        assert "ssd_forward" in _lowered(implementation)
    assert "ssd_forward" not in _lowered("scan")


def test_what_cannot_be_tiled_falls_back_only_where_nothing_was_named():
    odd = (1, 16, 4, 5, 2, 128)
    assert "ssd_forward" not in _lowered(None, odd)
    with pytest.raises(NotImplementedError, match="head of 5 channels"):
        _lowered("pallas_tpu", odd)


@pytest.mark.parametrize(
    "x, b, dtype, platform, reason",
    [
        ((1, 8, 4, 8), (1, 8, 1, 128), "bfloat16", "tpu", "8 channels is not a mult"),
        ((1, 8, 6, 64), (1, 8, 2, 128), "bfloat16", "tpu", "No divisor of 3 heads"),
        ((1, 8, 4, 64), (1, 8, 2, 64), "bfloat16", "tpu", "there are 2 groups"),
        ((1, 8, 4, 64), (1, 8, 1, 9), "float32", "tpu", "state of 9"),
        ((1, 8, 4, 64), (1, 8, 1, 128), "float16", "tpu", "not float16"),
        ((1, 8, 4, 64), (1, 8, 1, 128), "float32", "gpu", "not on 'gpu'"),
    ],
)
def test_refusals_say_why(x, b, dtype, platform, reason):
    x, b = jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct(b, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        plan.make(x, b, platform)


def test_many_heads_of_one_group_are_taken_in_parts():
    x = jax.ShapeDtypeStruct((1, 8, 80, 64), jnp.bfloat16)
    b = jax.ShapeDtypeStruct((1, 8, 1, 128), jnp.bfloat16)
    sizes = plan.make(x, b, "tpu")
    assert (sizes.heads, sizes.parts, sizes.width) == (20, 4, 1280)


def test_a_mesh_that_xla_divides_is_refused():
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(NotImplementedError, match="call it under jax.shard_map"),
    ):
        run(narrow(_inputs(T=1), jnp.float32), None, "pallas_tpu")
