"""Attention and convolution over shards of time are those of the whole sequence."""

import subprocess
import sys

import pytest

COMMON = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P

T = 64
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
# A start in mid-shard, one at a shard's first token, one a token before a shard's end,
# a segment over three shards.
ids = jnp.asarray(np.repeat([3, 1, 2, 7, 5, 0], [5, 11, 15, 18, 12, 3]))[None]
ids = jnp.concatenate([ids, jnp.ones_like(ids)])
mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
cut, whole = P(None, "context"), P()

def on_mesh(op, specs, out_specs):
    op = functools.partial(op, axis_name="context")
    return jax.shard_map(lambda inputs: op(**inputs), mesh=mesh, in_specs=(specs,),
                         out_specs=out_specs, check_vma=False)

def compare(sharded, single, inputs, cut_names, out_specs, cotangents, options):
    arrays = {k: z for k, z in inputs.items() if jnp.issubdtype(z.dtype, jnp.floating)}
    rules = {k: z for k, z in inputs.items() if k not in arrays}
    specs = {k: cut if k in cut_names else whole for k in inputs}
    run = on_mesh(functools.partial(sharded, **options), specs, out_specs)

    def with_gradients(f, arrays, rules):
        out, pull = jax.vjp(lambda z: f(**z, **rules), arrays)
        return out, pull(cotangents)[0]

    with_gradients = jax.jit(with_gradients, static_argnums=0)
    got = with_gradients(lambda **inputs: run(inputs), arrays, rules)
    want = with_gradients(single, arrays, rules)
    error = lambda g, w: float(jnp.abs(g - w).max() / jnp.abs(w).max())
    errors = jax.tree.map(error, got, want)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors
"""
ATTENTION = """
from pallas_kernels.attention import attention
from pallas_kernels.attention.context_parallel import attention_sharded
N, K, H = 4, 2, 8
qkv = dict(q=normal(2, T, N, H), k=normal(2, T, K, H), v=normal(2, T, K, H))
packed = dict(q_segment_ids=ids, kv_segment_ids=ids)
# Keys that no query of row 1 sees, in some shards and then in all.
masked = dict(kv_mask=jnp.stack([jnp.arange(T) < 40, jnp.zeros(T, bool)]))
for name, rules, causal in CASES:
    rules = dict(packed=packed, masked=masked)[rules]
    inputs = qkv | rules
    compare(functools.partial(attention_sharded, causal=causal),
            functools.partial(attention, causal=causal, implementation="xla"),
            inputs, inputs, cut, normal(2, T, N, H), dict(implementation=name))
"""
FEW_QUERIES = """
from pallas_kernels.attention import attention
from pallas_kernels.attention.context_parallel import attention_to_shards
N, K, H = 4, 2, 8
# One query of each segment, and one of none.
queries = jnp.array([3, 1, 2, 7, 5, 9])
inputs = dict(q=normal(2, 6, N, H), k=normal(2, T, K, H), v=normal(2, T, K, H),
              q_segment_ids=jnp.stack([queries, jnp.ones_like(queries)]),
              kv_segment_ids=ids, kv_mask=ids > 0)
compare(attention_to_shards,
        functools.partial(attention, causal=False, implementation="xla"),
        inputs, [k for k in inputs if k[0] != "q"], whole, normal(2, 6, N, H), {})
"""
CONVOLUTION = """
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.causal_conv1d.context_parallel import causal_conv1d_sharded
C, K = 5, 4
arrays = dict(x=normal(2, T, C), weight=normal(K, C), bias=normal(C),
              initial_state=normal(2, K - 1, C))
cotangents = normal(2, T, C), normal(2, K - 1, C)
for rules in ({}, dict(segment_ids=ids)):
    compare(causal_conv1d_sharded, causal_conv1d, arrays | rules, ("x", "segment_ids"),
            (cut, whole), cotangents, {})
"""


def _run(program):
    """JAX counts its devices once, so eight simulated ones need their own process."""
    flags = "--xla_force_host_platform_device_count=8"
    flags += " --xla_backend_optimization_level=0"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-3000:]


def test_a_ring_of_keys_is_the_whole_attention():
    cases = [("blockwise", "packed", True), ("blockwise", "masked", False)]
    _run(f"CASES = {cases}" + ATTENTION)


@pytest.mark.slow
def test_a_ring_of_splash_kernels_is_the_whole_attention():
    cases = [("splash_tpu", "packed", True), ("splash_tpu", "masked", False)]
    _run(f"CASES = {cases}" + ATTENTION)


def test_a_few_queries_read_the_keys_of_all_shards():
    _run(FEW_QUERIES)


def test_a_halo_makes_shards_the_whole_convolution():
    _run(CONVOLUTION)
