"""A bad update is not made: everything but the count of batches stays, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import mini
from timeviper_jax import sharding
from timeviper_jax.training import guard
from timeviper_jax.training.metrics import summarise
from timeviper_jax.training.step import create_state, make_train_step

MESH = sharding.make_mesh(fsdp=-1)
PATH = "projector/layers/0/kernel"


@pytest.fixture(scope="module")
def trained():
    """A step that learns the projector by Muon, from features; the state after one."""
    graph, params = mini.make_model()
    moving = {path: a for path, a in params.items() if path.startswith("projector/")}
    frozen = {path: a for path, a in params.items() if path not in moving}
    optimizer = mini.optimizer_of(moving)
    cfg = guard.GuardConfig(max_skips=2, spike_window=2, spike_deviations=3.0)
    state, _ = create_state(moving, optimizer, MESH, cfg)
    objective = mini.make_objective(cached=True)
    step = jax.jit(make_train_step(graph, objective, optimizer, guard_config=cfg))
    run = lambda state, batch: step(state, frozen, batch)
    state, _ = run(state, _batch(1.0))
    return run, state


def _batch(value: float):
    features = np.full((4, mini.FRAMES, 4, 32), value, np.float32)
    return dataclasses.replace(mini.make_batch(4), frames=None, features=features)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_no_number_leaves_everything_but_the_step(trained, value):
    run, before = trained
    after, means = run(before, _batch(value))
    assert (int(before.step), int(after.step)) == (1, 2)
    for part in ("params", "opt_state"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(after, part), getattr(before, part)
        )
    np.testing.assert_array_equal(after.guard.losses, before.guard.losses)
    assert int(after.guard.in_row) == 1
    scalars = summarise([means])
    assert scalars["skipped"] == 1
    assert np.isnan(scalars["loss"])  # Nothing was counted.


def test_the_next_good_batch_goes_on_as_if_there_had_been_none(trained):
    run, before = trained
    straight, means = run(before, _batch(0.5))
    skipped, bad = run(before, _batch(np.nan))
    around, _ = run(skipped, _batch(0.5))
    jax.tree.map(np.testing.assert_array_equal, around.params, straight.params)
    jax.tree.map(np.testing.assert_array_equal, around.opt_state, straight.opt_state)
    assert not np.array_equal(straight.params[PATH], before.params[PATH])
    assert int(around.guard.in_row) == 0
    # A window's means are those of the updates that were made.
    assert summarise([bad, means])["loss"] == summarise([means])["loss"]


def test_gradients_that_are_no_numbers_are_skipped_though_the_loss_is_one():
    good, _ = guard.judge(
        guard.init(guard.FINITE), jnp.float32(1.0), jnp.float32(np.nan), guard.FINITE
    )
    assert not good


def test_a_spike_is_told_by_the_losses_that_were_learned_from():
    cfg = guard.GuardConfig(max_skips=9, spike_window=4, spike_deviations=3.0)
    state, taken = guard.init(cfg), []
    for loss in (1.0, 1.1, 0.9, 50.0, np.nan, 1.0, 60.0, 1.0, 1.2, 0.8, 1.0, 3.0):
        good, state = guard.judge(state, jnp.float32(loss), jnp.float32(1.0), cfg)
        taken.append(bool(good))
    # 50 comes before the window is full; 60 is no spike to a window that holds it.
    want = [True] * 4 + [False] + [True] * 6 + [False]
    assert taken == want
    np.testing.assert_allclose(state.losses, [1.0, 1.2, 0.8, 1.0])
    assert int(state.in_row) == 1


def test_a_window_that_tells_nothing_is_an_error():
    with pytest.raises(ValueError, match="spike_window=1 0"):
        guard.GuardConfig(max_skips=1, spike_window=1, spike_deviations=3.0)
