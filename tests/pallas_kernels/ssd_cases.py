"""What tests of the SSD's kernels share: inputs, gradients, and the right values.

The right values are those of `scan` in float64, which test_ssd.py compares with the
recurrence.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ssd import ssd

ARGUMENTS = ("x", "dt", "a", "b", "c", "d", "initial_state")


def make_inputs(T, N, P, G, S, B=1, seed=0):
    """The arguments of `ssd` by name, in float64 NumPy but rounded to bfloat16."""
    rng = np.random.default_rng(seed)
    inputs = {
        "x": rng.normal(size=(B, T, N, P)),
        "dt": rng.exponential(0.1, size=(B, T, N)),
        "a": -rng.uniform(0.2, 2, size=N),
        "b": rng.normal(size=(B, T, G, S)),
        "c": rng.normal(size=(B, T, G, S)),
        "d": rng.normal(size=N),
        "initial_state": rng.normal(size=(B, N, P, S)),
    }
    round_ = lambda z: np.asarray(jnp.asarray(z, jnp.bfloat16), np.float64)
    return jax.tree.map(round_, inputs)


@functools.partial(jax.jit, static_argnames="implementation")
def run(inputs, segment_ids, implementation):
    return ssd(
        *(inputs[name] for name in ARGUMENTS[:5]),
        d=inputs["d"],
        initial_state=inputs["initial_state"],
        segment_ids=segment_ids,
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnames="implementation")
def run_with_gradients(inputs, cotangents, segment_ids, implementation):
    one = lambda inputs: run(inputs, segment_ids, implementation)
    (y, state), pull = jax.vjp(one, inputs)
    dy, dstate = cotangents
    return (y, state), pull((dy.astype(y.dtype), dstate))[0]


def narrow(inputs, dtype):
    """float32, but for the arrays that a model holds in its own dtype."""
    dtypes = dict.fromkeys(("x", "b", "c"), dtype)
    return {k: jnp.asarray(v, dtypes.get(k, jnp.float32)) for k, v in inputs.items()}


def assert_right(
    implementation, inputs, tolerance, segment_ids=None, dtype=jnp.float32
):
    """Outputs and gradients: `tolerance` is relative to an array's largest element."""
    rng = np.random.default_rng(1)
    cotangents = [rng.normal(size=inputs[k].shape) for k in ("x", "initial_state")]
    with jax.enable_x64(True):
        want = run_with_gradients(inputs, cotangents, segment_ids, "scan")
        want = jax.tree.map(np.asarray, want)
    short = [jnp.asarray(z, jnp.float32) for z in cotangents]
    got = run_with_gradients(narrow(inputs, dtype), short, segment_ids, implementation)
    assert got[0][0].dtype == dtype

    def error(g, w):
        g = np.asarray(g).astype(np.float64)
        return np.abs(g - w).max() / (np.abs(w).max() + 1e-30)

    errors = jax.tree.leaves_with_path(jax.tree.map(error, got, want))
    errors = {jax.tree_util.keystr(path): e for path, e in errors}
    # A NaN is not within any tolerance.
    assert all(e <= tolerance for e in errors.values()), errors
