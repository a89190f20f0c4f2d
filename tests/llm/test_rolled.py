"""A loop over stacked layers: its gradients, and what it computes for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from timeviper_jax.layers.layout import Layout
from timeviper_jax.llm import rolled

LAYOUT = Layout(segment_ids=jnp.ones((2, 3), jnp.int32))
MIXERS = {
    "wide": lambda p, x, layout: jnp.sin(x @ p["in"]) @ p["out"],
    "scale": lambda p, x, layout: p["gain"] * x * layout.valid[..., None],
}
# Those that run here are in the middle of their stacks.
LAYERS = (("wide", 1), ("scale", 0), ("wide", 2), ("scale", 1))


@pytest.fixture(scope="module")
def arrays():
    keys = iter(jax.random.split(jax.random.key(0), 4))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    wide = {"in": normal(4, 5, 7), "out": normal(4, 7, 5)}
    return {"wide": wide, "scale": {"gain": normal(2, 5)}}, normal(2, 3, 5)


def _in_a_loop(stacks, x):
    return rolled.run(MIXERS, LAYERS, stacks, x, LAYOUT)


def _one_by_one(stacks, x):
    for kind, i in LAYERS:
        own = {path: array[i] for path, array in stacks[kind].items()}
        x = x + MIXERS[kind](own, x, LAYOUT)
    return x


def _gradient(run, stacks, x):
    return jax.jit(jax.grad(lambda *args: jnp.sum(run(*args) ** 2), (0, 1)))(stacks, x)


def test_gradients_are_those_of_the_layers_one_by_one(arrays):
    np.testing.assert_allclose(
        _in_a_loop(*arrays), _one_by_one(*arrays), rtol=1e-5, atol=1e-5
    )
    got, want = (_gradient(run, *arrays) for run in (_in_a_loop, _one_by_one))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)
    # Layers that did not run have none.
    assert not np.any(got[0]["wide"]["in"][np.array([0, 3])])


def test_parameters_that_stand_still_get_no_gradient(arrays):
    stacks, x = arrays
    moving = {"gain": stacks["scale"]["gain"]}

    def loss(moving):
        return jnp.sum(_in_a_loop({**stacks, "scale": moving}, x))

    # Two matmuls forward, the same again and two for x going backward: none for them.
    program = str(jax.make_jaxpr(jax.grad(loss))(moving))
    assert program.count("dot_general") == 2 + 2 + 2
