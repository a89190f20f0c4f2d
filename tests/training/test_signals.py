"""Signals are heard while a long call goes on, and a second one is not waited for."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from timeviper_jax import sharding
from timeviper_jax.training.signals import SIGNALS, Interrupted, StopRequest, Votes


@pytest.fixture
def stop():
    before = [signal.getsignal(number) for number in SIGNALS]
    with contextlib.closing(StopRequest()) as stop:
        yield stop
    assert [signal.getsignal(number) for number in SIGNALS] == before


def _heard(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    end = time.monotonic() + 10
    while not stop and time.monotonic() < end:
        time.sleep(0.01)
    return bool(stop)


def test_a_signal_is_a_request(stop):
    assert not stop
    assert _heard(stop)


def test_a_signal_breaks_off_only_what_it_may(stop):
    with pytest.raises(Interrupted), stop.interrupting():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    with pytest.raises(Interrupted), stop.interrupting():
        raise AssertionError("It was asked before.")


def test_one_vote_is_enough(stop):
    votes = Votes(sharding.make_mesh(fsdp=-1))
    count = jax.jit(Votes.counted)
    assert not count(votes.of(stop))
    assert _heard(stop)
    assert np.asarray(count(votes.of(stop))) == 1


BUSY = """
import time
from timeviper_jax.training.signals import StopRequest
stop = StopRequest()
print("ready", flush=True)
while not stop:
    time.sleep(0.01)
print("asked", flush=True)
time.sleep(60)
"""


def test_a_second_signal_ends_the_process():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
