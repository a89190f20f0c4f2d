"""The kernels compile for real TPUs, forward and backward, with no chip."""

import os
import subprocess
import sys

import pytest

from pallas_kernels.bench import compiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not compiled.available(),
        reason="the TPU compiler is not installed: pip install libtpu",
    ),
]

# One group and several parts of it; few and narrow heads; float32 and a ragged end.
ODD = [
    (2304, 80, 64, 1, 128, "bfloat16"),
    (100, 4, 16, 1, 16, "bfloat16"),
    (700, 4, 64, 2, 128, "float32"),
]


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_nano_9b_compiles_in_little_memory(chip):
    forward = compiled.compile_apart(chip, "forward")
    assert forward["temp_bytes"] <= 0.05 * forward["input_bytes"]
    backward = compiled.compile_apart(chip, "backward")
    assert backward["temp_bytes"] <= 0.3 * forward["input_bytes"]


@pytest.mark.parametrize("shape", ODD)
def test_odd_shapes_compile(shape):
    report = compiled.compile_apart("v5e", "backward", shape)
    assert report["bundles"]["ssd_backward"] > 0


# Nano-9B's heads and a length that no large block divides; the encoder's heads; one
# key head, float32 and a ragged end.
ATTENTION = [
    ("v5e", (4352, 40, 8, 128)),
    ("v5p", (4352, 40, 8, 128)),
    ("v6e", (4352, 40, 8, 128)),
    ("v5e", (729, 16, 16, 72)),
    ("v5e", (500, 4, 1, 80, "float32")),
]


@pytest.mark.parametrize("chip, shape", ATTENTION)
def test_attention_compiles_to_splash_kernels(chip, shape):
    for direction in ("forward", "backward"):
        report = compiled.compile_apart(chip, direction, shape, op="attention")
        assert all(report["bundles"][kernel] > 0 for kernel in report["counted"])


def test_the_convolution_compiles():
    report = compiled.compile_apart(
        "v5e", "backward", (1000, 256, 4), op="causal_conv1d"
    )
    assert report["accessed_bytes"] > report["input_bytes"]


# A ring over the eight chips of a v5e, forward and backward.
RING = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels.attention.context_parallel import attention_sharded

devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
mesh = Mesh(np.array(devices), ("context",), axis_types=(AxisType.Auto,))
cut, T = P(None, "context"), 8 * 512
run = functools.partial(attention_sharded, axis_name="context", causal=True)

def with_gradients(q, k, v, ids, dy):
    packed = jax.shard_map(
        lambda q, k, v, ids: run(q, k, v, q_segment_ids=ids, kv_segment_ids=ids),
        mesh=mesh, in_specs=(cut,) * 4, out_specs=cut, check_vma=False)
    out, pull = jax.vjp(lambda *z: packed(*z, ids), q, k, v)
    return out, pull(dy)

place = NamedSharding(mesh, cut)
of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
q, k = (of(jnp.bfloat16, 1, T, heads, 128) for heads in (4, 2))
with jax.set_mesh(mesh):
    lowered = jax.jit(with_gradients).lower(q, k, k, of(jnp.int32, 1, T), q)
    text = lowered.compile().as_text()
kernels = ["splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"]
assert all(name in text for name in [*kernels, "collective-permute"])
assert "all-gather" not in text
"""


def test_a_ring_of_chips_runs_splash_kernels_and_gathers_nothing():
    environment = os.environ | compiled.ENVIRONMENT | {"PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", RING], env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-3000:]
