"""AdamW by path: what decays, what learns faster, when."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from timeviper_jax.training.optimizer import (
    OptimizerConfig,
    decays,
    make_optimizer,
    make_schedule,
)

CFG = OptimizerConfig(
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    warmup=0.1,
    final_lr=0.1,
)


def _params(**shapes):
    return {path: jnp.ones(shape) for path, shape in shapes.items()}


def _step(params, grads, cfg=CFG, multipliers=()):
    optimizer = make_optimizer(params, lambda _: 1e-2, cfg, multipliers)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return updates


def test_only_matrices_decay():
    params = {
        path: jnp.ones((4, 8))  # Stacked: a bias has two axes too.
        for path in (
            "llm/mlp/mixer/up/kernel",
            "llm/mlp/norm/scale",
            "llm/mamba/mixer/a_log",
            "llm/mamba/mixer/d",
            "llm/mamba/mixer/dt_bias",
            "vision/blocks/attn/q/bias",
        )
    }
    params["llm/transv/0/alpha"] = jnp.ones(())
    assert [path for path, does in decays(params).items() if does] == [
        "llm/mlp/mixer/up/kernel"
    ]


def test_decay_pulls_to_zero_without_a_gradient():
    params = _params(**{"a/kernel": (2, 2), "a/bias": (2,)})
    updates = _step(params, {path: jnp.zeros_like(p) for path, p in params.items()})
    np.testing.assert_allclose(updates["a/kernel"], -1e-2 * 0.1)
    np.testing.assert_array_equal(updates["a/bias"], 0)


def test_a_multiplier_speeds_up_the_paths_it_matches():
    params = _params(**{"llm/transv/0/alpha": (), "llm/norm/scale": ()})
    grads = {path: jnp.full_like(p, 0.5) for path, p in params.items()}
    updates = _step(params, grads, multipliers=((r"^llm/transv/", 5.0),))
    np.testing.assert_allclose(
        updates["llm/transv/0/alpha"], 5 * updates["llm/norm/scale"], rtol=1e-6
    )


def test_a_multiplier_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="'transvv' names no parameter"):
        make_optimizer(_params(a=()), lambda _: 1.0, CFG, (("transvv", 5.0),))


def test_gradients_are_clipped_by_their_global_norm():
    params = _params(a=(), b=())
    no_adam = dataclasses.replace(CFG, b1=0.0, eps=1e6)  # Updates follow the gradient.
    small = _step(params, {"a": jnp.array(0.6), "b": jnp.array(0.8)}, no_adam)
    large = _step(params, {"a": jnp.array(60.0), "b": jnp.array(80.0)}, no_adam)
    np.testing.assert_allclose(small["a"], large["a"], rtol=1e-4)


def test_the_rate_warms_up_and_falls_along_a_cosine():
    schedule = make_schedule(1.0, 100, CFG)
    np.testing.assert_allclose(
        [schedule(step) for step in (4, 9, 54, 99)],
        [0.5, 1.0, 0.55, 0.1],
        atol=1e-6,
    )


def test_the_shortest_stage_has_a_rate():
    assert make_schedule(1.0, 1, CFG)(0) == 1.0
