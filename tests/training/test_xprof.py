"""Which steps are traced, and by which names their operations go."""

import jax
import jax.numpy as jnp
import pytest

from tests.training import mini
from timeviper_jax.training import xprof
from timeviper_jax.training.parameters import merge
from timeviper_jax.training.xprof import Trace, read_steps


@pytest.mark.parametrize("text", ["", "3", "3-5", "0:2", "5:4", "1:2:3", "a:b", "-1:2"])
def test_steps_that_are_none_are_said_in_a_line(text):
    with pytest.raises(ValueError, match="not FIRST:LAST of a run's steps"):
        read_steps(text)


def test_steps_behind_the_last_are_an_error():
    Trace(read_steps("3:4"), total=4)
    with pytest.raises(ValueError, match="3:5 to trace end behind .* run, 4;"):
        Trace(read_steps("3:5"), total=4)


@pytest.fixture
def told(monkeypatch):
    """What the profiler is told."""
    told = []
    monkeypatch.setattr(
        xprof.jax.profiler, "start_trace", lambda folder: told.append("start")
    )
    monkeypatch.setattr(xprof.jax.profiler, "stop_trace", lambda: told.append("stop"))
    return told


def _make(trace, first, last, told):
    for step in range(first, last + 1):
        trace.before(step)
        told.append(step)
        trace.after(step, None)


@pytest.mark.parametrize(
    "first, last, want",
    [
        (1, 5, [1, "start", 2, 3, "stop", 4, 5]),
        (3, 4, ["start", 3, "stop", 4]),  # A run that continues at the third.
        (4, 5, [4, 5]),
        (1, 2, [1, "start", 2, "stop"]),  # One that is asked to stop.
    ],
)
def test_those_steps_are_traced_that_are_made(told, first, last, want):
    trace = Trace(range(2, 4), total=5)
    _make(trace, first, last, told)
    trace.close()
    trace.close()
    assert told == want


def test_by_default_nothing_is_traced(told):
    trace = Trace()
    _make(trace, 1, 3, told)
    trace.close()
    assert told == [1, 2, 3]


def test_a_trace_can_tell_the_parts_of_the_model_apart():
    """Forward, and in the backward pass of those that something learns before."""
    graph, params = mini.make_model()

    def loss(params, batch):
        return mini.make_objective()(merge(graph, params), batch)["loss"].total

    batch = jax.tree.map(jnp.asarray, mini.make_batch(2))
    text = jax.jit(jax.grad(loss)).lower(params, batch).as_text(debug_info=True)
    parts = ("vision", "projector", "mamba", "attention", "mlp", "transv", "head")
    for part in parts:
        assert f"jvp({part})" in text and f"transpose(jvp({part}))" in text, part
