"""Which checkpoints stay, and how far the steps may go ahead of the newest."""

import contextlib
import threading

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from timeviper_jax import checksums, sharding
from timeviper_jax.data.iterator import NamedBatches
from timeviper_jax.training import guard, loop
from timeviper_jax.training.checkpoint import (
    Checkpoints,
    Keep,
    RunRecord,
    load_params,
)
from timeviper_jax.training.metrics import Mean, MetricsWriter
from timeviper_jax.training.phases import PHASES, Phases
from timeviper_jax.training.signals import StopRequest
from timeviper_jax.training.step import create_state

SCALE = "llm/norm/scale"
OPTIMIZER = optax.chain(optax.scale(-1.0), optax.scale_by_schedule(lambda _: 1.0))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(fsdp=-1)


@pytest.fixture
def begun(mesh):
    """A state of one small parameter, and where it lives."""
    return create_state({SCALE: jnp.zeros(4)}, OPTIMIZER, mesh)


def test_the_newest_and_the_best_stay():
    scores = {1: 0.5, 2: 0.1, 3: None, 4: 0.1, 5: 0.3, 6: None, 7: 0.9}
    assert Keep(last=2, best=0).of(scores) == {6, 7}
    assert Keep(last=2, best=1).of(scores) == {2, 6, 7}  # Of equals the earlier.
    assert Keep(last=3, best=3).of(scores) == {2, 4, 5, 6, 7}


def test_less_than_two_checkpoints_are_too_few():
    with pytest.raises(ValueError, match="keep_last=1 must be 2 or more"):
        Keep(last=1, best=0)


def test_a_run_keeps_its_best_checkpoints_beside_the_newest(tmp_path, mesh, begun):
    state, _ = begun
    scores = {1: 0.2, 2: 0.5, 3: 0.3, 4: 0.9, 5: None}
    checkpoints = Checkpoints(tmp_path, keep=Keep(last=2, best=2))
    for step, score in scores.items():
        record = RunRecord(
            step=step, stage="only", stage_step=step, config={}, score=score
        )
        state = state._replace(params={SCALE: jnp.full(4, float(step))})
        checkpoints.save(record, state, {}, {})
    checkpoints.close()
    assert _steps(tmp_path) == [1, 3, 4, 5]

    # What opens the run anew knows the scores of those before it.
    checkpoints = Checkpoints(tmp_path, keep=Keep(last=2, best=1))
    assert checkpoints.latest().step == checkpoints.sealed == 5
    record = RunRecord(step=6, stage="only", stage_step=6, config={}, score=0.8)
    checkpoints.save(record, state, {}, {})
    checkpoints.close()
    assert _steps(tmp_path) == [1, 5, 6]
    (tmp_path / "checkpoints" / "6" / checksums.MANIFEST).unlink()
    np.testing.assert_array_equal(load_params(tmp_path, mesh)[SCALE], np.full(4, 5.0))


def _steps(workdir):
    return sorted(int(path.name) for path in checksums.steps(workdir / "checkpoints"))


@pytest.mark.parametrize("ahead", [0, 2])
def test_steps_wait_for_a_save_rather_than_break_the_promise(
    tmp_path, mesh, begun, monkeypatch, ahead
):
    """A seal is set when the last step that may go ahead of it is made."""
    every, steps, made = 3, 10, _Made()
    seal, found = checksums.write, {}

    def seal_late(folder):
        saved = int(folder.name)
        made.wait_for(min(saved + ahead, steps))
        seal(folder)
        found[saved] = made.last

    monkeypatch.setattr(checksums, "write", seal_late)
    _run(tmp_path, mesh, begun, made, steps, every=every, most=every + ahead)
    assert found == {saved: min(saved + ahead, steps) for saved in (3, 6, 9, 10)}


class _Made(MetricsWriter):
    """Which step was logged last; others wait for it."""

    def __init__(self):
        self.last, self._changed = 0, threading.Condition()

    def write(self, step, scalars, **labels):
        with self._changed:
            self.last = step
            self._changed.notify_all()

    def wait_for(self, step):
        with self._changed:
            assert self._changed.wait_for(lambda: self.last >= step, timeout=30)


def _run(workdir, mesh, begun, made, steps, *, every, most):
    state, places = begun
    one = Mean.single(jnp.ones(()))

    def step(state, frozen, batch):
        memory = OPTIMIZER.update(state.params, state.opt_state)[1]
        zero = Mean.single(jnp.zeros(()))
        return state._replace(opt_state=memory), dict(loss=one, skipped=zero)

    numbers = grain.MapDataset.range(steps).map(lambda i: (np.array([i]), (str(i),)))
    with (
        contextlib.closing(StopRequest()) as stop,
        contextlib.closing(Phases(dict.fromkeys(PHASES, 60.0))) as phases,
        contextlib.closing(Checkpoints(workdir, keep=Keep(last=2, best=0))) as kept,
    ):
        watch = loop.Watch(
            config=dict(
                log_every=1,
                checkpoint_every=every,
                max_redone=most,
                validation=dict(every=0),
            ),
            mesh=mesh,
            checkpoints=kept,
            resumed=None,
            writer=made,
            phases=phases,
            stop=stop,
        )
        plan = loop.Plan(
            name="only",
            before=0,
            first=0,
            steps=steps,
            train_step=step,
            flops=0,
            count=lambda batch: {},
            places=places,
            frozen={},
            batches=NamedBatches(iter(numbers.to_iter_dataset())),
            place=jax.device_put,
            schedule=lambda _: 1.0,
            guard=guard.FINITE,
            validation=None,
        )
        loop.Loop(watch, plan, state).run()


def test_a_promise_that_no_schedule_keeps_is_an_error(tmp_path, mesh, begun):
    with pytest.raises(ValueError, match="each 5 steps cannot promise that at most 4"):
        _run(tmp_path, mesh, begun, _Made(), 10, every=5, most=4)
