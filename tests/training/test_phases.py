"""Seconds by phase, and processes that stand still and are ended."""

import subprocess
import sys

import pytest

from timeviper_jax.training import phases
from timeviper_jax.training.phases import PHASES, Phases

LIMITS = dict.fromkeys(PHASES, 100.0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(phases.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def watch(clock):
    watch = Phases(LIMITS)
    yield watch
    watch.close()


def test_every_second_belongs_to_one_phase(clock, watch):
    for at, phase in ((2, "compile"), (5, "step"), (9, "data"), (10, "step")):
        clock.now = at
        watch.enter(phase)
    clock.now = 20
    with watch.within("eval"):
        clock.now = 23
    clock.now = 24
    seconds = watch.seconds()
    want = dict(setup=2, compile=3, data=1, step=4 + 10 + 1, save=0, eval=3, lost=0)
    assert seconds == want
    assert watch.scalars()["goodput"] == 15 / 24


def test_a_wait_while_the_device_works_is_no_loss(clock, watch):
    watch.enter("data")
    clock.now = 3
    watch.wait_was_free(began=1.0)
    assert watch.seconds()["data"] == 1
    assert watch.seconds()["step"] == 2


def test_a_continued_run_counts_what_was_made_twice(watch):
    saved = dict(setup=3.0, step=10.0, lost=1.0)
    watch.resume(saved, dict(seconds_setup=3.0, seconds_step=14.0, seconds_lost=1.0))
    assert watch.seconds() | dict(setup=3.0) == dict.fromkeys(
        ("compile", "data", "save", "eval"), 0.0
    ) | dict(setup=3.0, step=10.0, lost=1.0 + 4.0)


def test_limits_are_of_every_phase():
    with pytest.raises(ValueError, match="must be seconds of"):
        Phases({"step": 1.0})
    with pytest.raises(ValueError, match="must be seconds of"):
        Phases(LIMITS | {"step": 0.0})


STANDS_STILL = """
import re, time
from timeviper_jax.training.phases import PHASES, Phases
watch = Phases(dict.fromkeys(PHASES, 60.0) | dict(step=1.0))
watch.enter("step")
def stand_still():
    {}
stand_still()
"""


@pytest.mark.parametrize(
    "call, status",
    [
        ("time.sleep(60)", phases.HUNG),
        # This never lets another thread run.
        ("re.match('(a+)+$', 'a' * 60 + 'b')", 1),
    ],
)
def test_a_process_that_stands_still_is_ended_with_its_stacks(call, status):
    command = [sys.executable, "-c", STANDS_STILL.format(call)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == status
    assert "in stand_still" in done.stderr
