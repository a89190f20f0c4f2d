"""AdamW by path: what decays, what learns faster, when."""

import dataclasses

import jax
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
    muon=False,
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


MUON = dataclasses.replace(CFG, muon=True, weight_decay=0.0)


def _grads(params):
    keys = jax.random.split(jax.random.key(0), len(params))
    return {
        path: jax.random.normal(key, array.shape)
        for key, (path, array) in zip(keys, params.items(), strict=True)
    }


@pytest.mark.parametrize(
    ("path", "shape", "matrix"),
    [
        ("llm/mlp/mixer/up/kernel", (2, 8, 16), (2, 8, 16)),
        ("llm/mamba/mixer/in_x/kernel", (2, 8, 16), (2, 8, 16)),
        ("llm/attention/mixer/q/kernel", (2, 8, 4, 3), (2, 8, 12)),
        ("llm/attention/mixer/out/kernel", (2, 4, 3, 8), (2, 12, 8)),
        ("llm/transv/0/out/kernel", (4, 3, 8), (12, 8)),
        ("vision/blocks/attn/k/kernel", (2, 8, 4, 3), (2, 8, 12)),
        ("projector/first/layers/0/kernel", (8, 16), (8, 16)),
    ],
)
def test_muon_moves_each_layers_matrix_alike_in_every_direction(path, shape, matrix):
    params = _params(**{path: shape})
    update = _step(params, _grads(params), MUON)[path] / -1e-2
    singular = np.linalg.svd(np.reshape(update, matrix), compute_uv=False)
    # Orthogonal up to the five iterations, and of the size that Adam's updates have.
    size = 0.2 * max(matrix[-2:]) ** 0.5
    assert singular.min() > 0.6 * size and singular.max() < 1.3 * size


def test_muon_leaves_to_adam_what_is_no_matrix_between_features():
    params = _params(
        **{
            "llm/embed/embedding": (8, 4),
            "llm/head/kernel": (4, 8),
            "llm/mamba/mixer/conv_x/kernel": (2, 4, 8),
            "llm/mamba/mixer/in_dt/kernel": (2, 8, 4),
            "llm/mlp/norm/scale": (2, 8),
            "llm/transv/0/alpha": (),
        }
    )
    grads = _grads(params)
    wanted = _step(params, grads, dataclasses.replace(MUON, muon=False))
    for path, update in _step(params, grads, MUON).items():
        np.testing.assert_array_equal(update, wanted[path])


@pytest.mark.parametrize("cfg", [CFG, MUON], ids=["adamw", "muon"])
def test_first_moments_have_their_own_dtype(cfg):
    params = _params(**{"llm/mlp/mixer/up/kernel": (1, 4, 4), "llm/norm/scale": (4,)})
    cfg = dataclasses.replace(cfg, momentum_dtype="bfloat16")
    state = make_optimizer(params, lambda _: 1e-2, cfg).init(params)
    moments = [x for x in jax.tree.leaves(state) if x.size in (16, 4)]
    assert [x.dtype.name for x in moments].count("bfloat16") == 2
    # Muon's matrix has no second moment.
    assert len(moments) == (3 if cfg.muon else 4)
