"""What a line of metrics says of speed: what was counted, over the time that passed."""

import json
import os
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import mini
from timeviper_jax import sharding
from timeviper_jax.data.examples import Role
from timeviper_jax.data.frames import FrameBatch
from timeviper_jax.training import experiment, phases, speed
from timeviper_jax.training.phases import PHASES, Phases
from timeviper_jax.training.speed import Speed


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(phases.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def watch(clock):
    watch = Phases(dict.fromkeys(PHASES, 1e6))
    yield watch
    watch.close()


def make_speed(watch, flops=0):
    return Speed(watch, sharding.make_mesh(fsdp=-1), flops)


def make_steps(measured, *tokens):
    for number in tokens:
        measured.add({"tokens": jnp.int32(number), "frames": jnp.int32(2)})


def test_rates_are_of_the_steps_since_the_last_line(clock, watch):
    measured = make_speed(watch)
    make_steps(measured, 30, 50)
    clock.now = 4.0
    found = measured.scalars()
    assert found["steps_per_second"] == 2 / 4
    assert found["tokens_per_second"] == (30 + 50) / 4
    assert found["frames_per_second"] == (2 + 2) / 4
    make_steps(measured, 7)
    clock.now = 6.0
    assert measured.scalars()["tokens_per_second"] == 7 / 2


def test_a_window_that_a_resume_cuts_is_of_its_own_process(clock, watch):
    """What earlier processes took, and the time to set up, are no part of it."""
    clock.now = 50.0
    watch.enter("data")
    watch.resume(dict(step=300.0, data=40.0), dict(seconds_step=310.0))
    measured = make_speed(watch)
    clock.now = 51.0
    watch.enter("step")
    make_steps(measured, 12)
    clock.now = 54.0
    found = measured.scalars()
    assert found["tokens_per_second"] == 12 / 4
    assert found["input_bound"] == 1 / 4


def test_waits_that_cost_nothing_are_not_bound_by_input(clock, watch):
    measured = make_speed(watch)
    watch.enter("data")
    clock.now = 2.0
    watch.wait_was_free(began=0.0)
    make_steps(measured, 1)
    watch.enter("step")
    clock.now = 3.0
    assert measured.scalars()["input_bound"] == 0


def test_mfu_is_the_share_of_the_peak_of_all_devices(clock, watch, monkeypatch):
    monkeypatch.setattr(speed, "peak_flops", lambda kind: 1e12)
    measured = make_speed(watch, flops=3 * 10**11)
    make_steps(measured, 1, 1)
    clock.now = 4.0
    assert measured.scalars()["mfu"] == 2 * 3e11 / (4 * 1e12 * jax.device_count())


def test_what_the_machine_does_not_tell_is_left_out(clock, watch):
    measured = make_speed(watch, flops=10**12)
    make_steps(measured, 1)
    clock.now = 1.0
    found = measured.scalars()
    assert not [name for name in found if name == "mfu" or name.startswith("hbm_")]
    assert all(name.startswith(speed.OF_THE_MACHINE) for name in found)


def test_memory_is_that_of_the_fullest_device(clock, watch, monkeypatch):
    measured = make_speed(watch)
    devices = [
        types.SimpleNamespace(
            memory_stats=lambda n=n: dict(
                bytes_in_use=n << 30, peak_bytes_in_use=9 << 30
            )
        )
        for n in (1, 5)
    ]
    monkeypatch.setattr(measured, "_devices", devices)
    make_steps(measured, 1)
    clock.now = 1.0
    found = measured.scalars()
    assert (found["hbm_gib"], found["hbm_peak_gib"]) == (5, 9)
    devices[0].memory_stats = lambda: dict(bytes_in_use=1)
    make_steps(measured, 1)
    clock.now = 2.0
    assert "hbm_peak_gib" not in measured.scalars()


def test_padding_is_no_token_and_no_frame():
    """Of four frames a row shows one, two and all; text ends early in all."""
    V = mini.CONFIG.tokens_per_frame
    batch = mini.make_batch(3)
    for row, shown in enumerate((1, 2, 4)):
        batch.roles[row] = Role.PAD
        batch.roles[row, : 1 + shown * V] = Role.VISION
        batch.roles[row, 0], batch.roles[row, 1 + shown * V] = Role.TEXT, Role.ANSWER
    found = jax.tree.map(int, mini.make_task().count(batch, mini.CONFIG))
    assert found == {"tokens": (1 + 2 + 4) * V + 3 * 2, "frames": 1 + 2 + 4}


def test_frames_without_text_are_counted_alone():
    task = experiment.FrameTask(words=("a", "b"), per_record=1, share=0.5)
    batch = FrameBatch(
        frames=np.zeros((5, 2, 2, 3), np.uint8), labels=np.zeros(5, np.int32)
    )
    assert jax.tree.map(int, task.count(batch, mini.CONFIG)) == {"frames": 5}


@pytest.mark.slow
def test_two_processes_count_every_row_once():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.count_in_two", address, str(index)],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    # Gloo, which carries their collectives, prints before.
    last = [process.communicate()[0].splitlines()[-1] for process in processes]
    found = [json.loads(line) for line in last]
    alone = mini.make_task().count(mini.make_batch(mini.ROWS), mini.CONFIG)
    want = jax.tree.map(int, alone)
    assert found[0] == found[1]
    parts = {"rows": 2, "tokens": 1, "both": 2}
    assert found[0] == {name: want | {"parts": n} for name, n in parts.items()}
