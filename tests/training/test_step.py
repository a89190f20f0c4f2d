"""A step of training: by parts, on one device or eight, with much of it frozen."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.training import mini
from timeviper_jax import sharding
from timeviper_jax.training import guard
from timeviper_jax.training.metrics import Mean, summarise
from timeviper_jax.training.parameters import split
from timeviper_jax.training.step import TrainState, create_state, make_train_step

MESH = sharding.make_mesh(fsdp=-1)


@pytest.fixture(scope="module")
def model():
    return mini.make_model()


def _run(model, batch, moving, *, cached=False, accumulate=1, steps=1):
    """State and logged means after some steps on one batch, and how to lower one."""
    graph, params = model
    frozen = {path: p for path, p in params.items() if path not in moving}
    # Donated buffers are gone afterwards; the fixture's are to stay.
    params = {path: p.copy() for path, p in params.items() if path in moving}
    optimizer = mini.optimizer_of(params)
    state, _ = create_state(params, optimizer, MESH)
    objective = mini.make_objective(cached=cached)
    step = make_train_step(graph, objective, optimizer, accumulate=accumulate)
    step = jax.jit(step, donate_argnums=0)
    batch, window = sharding.put(batch, MESH), []
    for _ in range(steps):
        state, means = step(state, frozen, batch)
        window.append(summarise([means]))
    return state, window, lambda: step.lower(state, frozen, batch)


@pytest.fixture(scope="module")
def whole(model):
    batch = mini.make_batch(mini.ROWS)
    return batch, *_run(model, batch, model[1], steps=mini.STEPS)


def test_it_learns_a_batch_by_heart(whole):
    _, _, window, _ = whole
    losses = [means["loss"] for means in window]
    assert losses[-1] < 0.5 * losses[0]


def test_accumulated_parts_are_one_batch(model, whole):
    batch, _, window, _ = whole
    answers = batch.loss_mask.sum(axis=1)
    assert len(set(answers)) > 1  # Else an average of averages would do.
    state, parts, _ = _run(model, batch, model[1], accumulate=2, steps=mini.STEPS)
    for means, want in zip(parts, window, strict=True):
        for name in want:
            np.testing.assert_allclose(means[name], want[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        state.params["llm/head/kernel"], whole[1].params["llm/head/kernel"], atol=1e-5
    )


def _squares(model, batch):
    """A cheap objective of which rows have different numbers of targets."""
    error = (model(batch["x"]) - batch["y"]) ** 2
    return {"loss": Mean.of(error.sum(-1), batch["counts"])}


def test_the_gradient_of_four_parts_is_that_of_the_batch_to_1e_6():
    graph, params = split(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(8, 5)).astype(np.float32),
        "y": rng.normal(size=(8, 3)).astype(np.float32),
        "counts": np.arange(8, dtype=np.float32),
    }
    descent = optax.sgd(1.0)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=descent.init(params),
        guard=guard.init(guard.FINITE),
    )
    after = [
        jax.jit(make_train_step(graph, _squares, descent, accumulate=parts))(
            state, {}, batch
        )
        for parts in (1, 4)
    ]
    (one, means), (four, parts) = after
    np.testing.assert_allclose(parts["loss"], means["loss"], rtol=1e-6)
    for path in params:
        gradient = params[path] - one.params[path]
        scale = np.abs(gradient).max()
        assert scale > 0.1
        np.testing.assert_allclose(
            params[path] - four.params[path], gradient, atol=1e-6 * scale
        )


def test_frozen_parameters_have_no_gradient_and_no_memory(model):
    graph, params = model
    moving = {path for path in params if path.startswith(("projector/", "llm/transv"))}
    batch = dataclasses.replace(
        mini.make_batch(4),
        frames=None,
        features=np.ones((4, mini.FRAMES, 4, 32), np.float16),
    )
    state, _, lower = _run(model, batch, moving, cached=True)
    moments = jax.tree.leaves(state.opt_state)
    assert sum(m.size for m in moments) < 2.1 * sum(params[p].size for p in moving)
    changed = {p for p in moving if not np.array_equal(state.params[p], params[p])}
    assert changed == moving
    # Features are given: the encoder is not even an argument of the program.
    given = lower().compile().memory_analysis().argument_size_in_bytes
    arguments = jax.tree.leaves((state, params, batch))
    encoder = [p for path, p in params.items() if path.startswith("vision/")]
    size = lambda arrays: sum(array.nbytes for array in arrays)
    moved = size(state.params.values())  # Counted in `params` too.
    assert given <= size(arguments) - moved - size(encoder)


def _on_eight_devices(mesh):
    """What `tests/training/eight_devices.py` finds on eight simulated devices."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.eight_devices", mesh],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "mesh, shards",
    [
        ("fsdp", 8),
        pytest.param("data", 1, marks=pytest.mark.slow),
        pytest.param("mixed", 4, marks=pytest.mark.slow),
    ],
)
def test_a_step_on_eight_devices_equals_a_single_devices(whole, mesh, shards):
    got, (_, state, window, _) = _on_eight_devices(mesh), whole
    assert got["shards"] == shards
    want = [means["loss"] for means in window]
    np.testing.assert_allclose(got["losses"], want, rtol=1e-4)
    for path, values in got["params"].items():
        single = np.asarray(state.params[path]).ravel()[:64]
        np.testing.assert_allclose(values, single, atol=1e-4, err_msg=path)
