"""The GPU kernels of the SSD, interpreted: the recurrence, values and gradients.

Shapes are the smallest that have two chunks, a ragged end, two groups, and heads that
are cut in parts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from ssd_cases import assert_right, make_inputs, narrow, run

from pallas_kernels.ssd.gpu import plan

CHIP = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")


def _short():
    """Two tiles of one chunk; several tests share the compiled program."""
    return make_inputs(T=100, N=2, P=16, G=1, S=16)


_assert_right = functools.partial(assert_right, "pallas_gpu")


def test_packed_and_ragged_in_float32():
    # Segments end in mid-tile, at a tile's edge, after one token; one spans two chunks.
    lengths = [3, 1, 60, 70, 156, 5, 300]
    segment_ids = np.repeat([1, 2, 3, 4, 9, 5, 0], lengths)[None, :300]
    _assert_right(make_inputs(T=300, N=4, P=48, G=2, S=32), 5e-6, segment_ids)


def test_bfloat16_with_heads_in_parts():
    # Rounding of y, of weights and of states for the matmuls: 4.7e-3 has been seen.
    _assert_right(make_inputs(140, 2, 80, 1, 16, B=2), 6e-3, dtype=jnp.bfloat16)


def test_one_token():
    _assert_right(make_inputs(T=1, N=2, P=16, G=1, S=16), 5e-6)


def test_strong_decay_neither_overflows_nor_loses_the_gradient():
    # Every other token all but empties the state: the sum reaches -1e5 in a chunk.
    inputs = _short()
    inputs["a"][:] = -100
    strong = np.arange(100)[:, None] % 2
    inputs["dt"] = np.where(strong, 4, 1e-3) * (inputs["dt"] + 0.5)
    # Where float32 is exact to 1e-2 of an exponent.
    _assert_right(inputs, 2e-2)


def test_zero_and_tiny_steps():
    inputs = _short()
    inputs["dt"][:, 2:9] = 0
    inputs["dt"][:, 9:20] = 1e-30
    _assert_right(inputs, 5e-6)


def _lowered(implementation, P=80, with_gradients=False):
    """The text of the program for a GPU, which holds the kernels by name."""
    arrays = narrow(make_inputs(T=100, N=4, P=P, G=2, S=128), jnp.bfloat16)
    forward = functools.partial(run, segment_ids=None, implementation=implementation)

    def forward_and_back(arrays):
        outputs, pull = jax.vjp(forward, arrays)
        return outputs, pull(outputs)

    program = jax.jit(forward_and_back if with_gradients else forward)

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=CHIP)):
        return program.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_the_kernels_are_what_runs_where_they_are_named():
    text = _lowered("pallas_gpu", with_gradients=True)
    for step in ("states", "scan", "output", "scan_back", "dx", "dpairs", "dc", "db"):
        assert f'"ssd_gpu_{step}"' in text, step
    assert "ssd_gpu" not in _lowered("scan")


def test_the_automatic_choice_waits_for_a_measurement():
    assert "ssd_gpu" not in _lowered(None)


def test_a_named_kernel_is_not_replaced():
    with pytest.raises(NotImplementedError, match="head of 24 channels"):
        _lowered("pallas_gpu", P=24)


@pytest.mark.parametrize(
    "x, b, dtype, platform, reason",
    [
        ((1, 8, 4, 40), (1, 8, 1, 128), "bfloat16", "gpu", "40 channels is not a mult"),
        ((1, 8, 4, 256), (1, 8, 1, 128), "bfloat16", "gpu", "256 channels is not a mu"),
        ((1, 8, 4, 64), (1, 8, 1, 96), "float32", "gpu", "state of 96 is not one of"),
        ((1, 8, 4, 64), (1, 8, 1, 128), "float16", "gpu", "not float16"),
        ((1, 8, 4, 64), (1, 8, 1, 128), "float32", "tpu", "not on 'tpu'"),
    ],
)
def test_refusals_say_why(x, b, dtype, platform, reason):
    x, b = jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct(b, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        plan.make(x, b, platform)


def test_arrays_of_two_dtypes_are_refused():
    inputs = narrow(_short(), jnp.float32)
    inputs["b"] = inputs["b"].astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="must be of one dtype"):
        run(inputs, None, "pallas_gpu")


def test_a_mesh_that_xla_divides_is_refused():
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(NotImplementedError, match="call it under jax.shard_map"),
    ):
        run(narrow(_short(), jnp.float32), None, "pallas_gpu")
