"""The SSD over shards of time is the SSD of the whole, values and gradients."""

import subprocess
import sys

# JAX counts its devices once, so the eight simulated ones need their own process.
PROGRAM = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.context_parallel import ssd_sharded

T, N, W, G, S = 64, 4, 3, 2, 5
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
inputs = dict(
    x=normal(2, T, N, W), dt=jnp.exp(normal(2, T, N) - 2), a=-jnp.exp(normal(N)),
    b=normal(2, T, G, S), c=normal(2, T, G, S), d=normal(N),
    initial_state=normal(2, N, W, S),
)
# A start in mid-shard, one at a shard's first token, a segment over three shards.
ids = jnp.asarray(np.repeat([3, 1, 2, 5, 0], [5, 11, 30, 15, 3]))[None]
ids = jnp.concatenate([ids, jnp.ones_like(ids)])
cotangents = normal(2, T, N, W), normal(2, N, W, S)
mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
cut, whole = P(None, "context"), P()
specs = dict(x=cut, dt=cut, a=whole, b=cut, c=cut, d=whole, initial_state=whole)

def run(op, inputs, ids):
    args = [inputs[k] for k in "x dt a b c".split()]
    return op(*args, d=inputs["d"], initial_state=inputs["initial_state"],
              segment_ids=ids, chunk_size=4, implementation="scan")

def on_mesh(inputs, ids):
    op = functools.partial(run, functools.partial(ssd_sharded, axis_name="context"))
    return jax.shard_map(op, mesh=mesh, in_specs=(specs, None if ids is None else cut),
                         out_specs=(cut, whole), check_vma=False)(inputs, ids)

def with_gradients(f, ids):
    out, pull = jax.vjp(lambda z: f(z, ids), inputs)
    return out, pull(cotangents)[0]

for ids in (None, ids):
    got = jax.jit(lambda: with_gradients(on_mesh, ids))()
    want = jax.jit(lambda: with_gradients(functools.partial(run, ssd), ids))()
    error = lambda g, w: float(jnp.abs(g - w).max() / jnp.abs(w).max())
    errors = jax.tree.map(error, got, want)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors
"""


def test_eight_shards_are_the_whole():
    flags = "--xla_force_host_platform_device_count=8"
    flags += " --xla_backend_optimization_level=0"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-3000:]
