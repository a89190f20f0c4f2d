"""Workers decode what we would, die alone, and are remembered by those that resume."""

import os
import signal

import numpy as np
import pytest
from PIL import Image

from timeviper_jax.data import video
from timeviper_jax.data.media import MediaLimits, VideoError
from timeviper_jax.data.quarantine import Quarantine
from timeviper_jax.data.workers import WorkerConfig, WorkerDied, WorkerPool

TIMES = np.arange(0.125, 24, 0.25)


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(MediaLimits(max_seconds=100), WorkerConfig(count=1))
    yield pool
    pool.close()


def _pid(pool) -> int:
    worker = pool._idle.get()
    pool._idle.put(worker)
    return worker._process.pid


def test_workers_give_the_frames_and_the_errors_of_their_caller(pool, film, tmp_path):
    path = film("fast.mp4", 96, fps=4)
    assert pool.probe(str(path)) == video.probe(path)
    got = pool.read_frames(str(path), TIMES, 24)
    np.testing.assert_array_equal(got, video.read_frames(path, TIMES, 24))
    # More than there is room for at once.
    large = pool.read_frames(str(path), TIMES[:5], 1_400)
    np.testing.assert_array_equal(large, video.read_frames(path, TIMES[:5], 1_400))
    pid = _pid(pool)
    with pytest.raises(VideoError, match="missing.mp4: no such file"):
        pool.probe(str(tmp_path / "missing.mp4"))
    cut = tmp_path / "cut.mp4"
    whole = film("plain.mkv", 96, fps=4).read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"only \d+ of 96 frames"):
        pool.read_frames(str(cut), TIMES[::16], 1_400)
    long = film("long.mp4", 101, fps=1)
    with pytest.raises(VideoError, match="101 seconds, but the limit is 100"):
        pool.read_frames(str(long), [1.0], 24)
    np.testing.assert_array_equal(pool.read_frames(str(path), TIMES, 24), got)
    with pytest.raises(ValueError, match="4000 pixels a side takes more than"):
        pool.read_frames(str(path), [1.0], 4_000)
    assert _pid(pool) == pid  # No error ends a worker.


def test_a_worker_that_dies_is_replaced(pool, film):
    path = str(film("fast.mp4", 96, fps=4))
    want = pool.read_frames(path, [1.0], 24)
    pid = _pid(pool)
    os.kill(pid, signal.SIGSEGV)
    with pytest.raises(WorkerDied, match=r"fast.mp4: .* died of SIGSEGV") as error:
        pool.read_frames(path, [1.0], 24)
    assert error.value.path == path
    np.testing.assert_array_equal(pool.read_frames(path, [1.0], 24), want)
    assert _pid(pool) != pid


@pytest.mark.parametrize(
    "bounds, message",
    [
        (dict(cpu_seconds=0.03), "took over 0.03 s of processor time"),
        (dict(wall_seconds=0.001), "took over 0.001 s"),
    ],
)
def test_bounds_end_a_worker(film, bounds, message):
    pool = WorkerPool(MediaLimits(), WorkerConfig(count=1, **bounds))
    path = film("fast.mp4", 96, fps=4)
    with pytest.raises(WorkerDied, match=message):
        pool.read_frames(str(path), np.repeat(TIMES, 20), 768)
    pool.close()


def test_a_worker_has_no_more_memory_than_it_may(tmp_path):
    pool = WorkerPool(MediaLimits(), WorkerConfig(count=1, memory_bytes=1 << 26))
    path = tmp_path / "large.png"
    Image.new("L", (6_000, 6_000)).save(path)
    with pytest.raises(WorkerDied, match="asked for more than 0.0625 GiB of memory"):
        pool.read_frames(str(path), [0.5], 64)
    pool.close()


def test_workers_must_be_allowed_something():
    with pytest.raises(ValueError, match="must allow for some memory and time"):
        WorkerConfig(memory_bytes=0)


def test_a_death_is_taken_as_it_was_and_later_draws_leave_the_file_alone():
    quarantine = Quarantine(at_once=16)
    quarantine.add("bad.mp4", 7, 0)
    resumed = Quarantine(at_once=16)
    resumed.restore(quarantine.deaths())
    assert resumed.deaths() == [("bad.mp4", 7, 0)]
    for position, attempt in ((7, 0), (7 + 5_000, 0), (7 + 5_000, 3)):
        with pytest.raises(VideoError, match="bad.mp4: in quarantine"):
            resumed.check(["good.mp4", "bad.mp4"], position, attempt)
    # These may have been under way when the worker died.
    for position, attempt in ((6, 0), (7, 1), (8, 0)):
        resumed.check(["bad.mp4"], position, attempt)
    resumed.check(["good.mp4"], 7, 0)


def test_hosts_may_not_read_further_ahead_than_a_death_is_waited_for():
    with pytest.raises(ValueError, match="lower prefetch_examples"):
        Quarantine(at_once=5_000)
