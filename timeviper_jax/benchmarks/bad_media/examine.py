"""What becomes of one file: refused, or read; and whether it is shorter than it says.

A file is read as training would, in the bounded workers. One that was read is decoded
once more by FFmpeg alone, without any of our rules, and the frames are counted: fewer
than the file declares, and not refused, is a short decode that nobody was told of.
"""

import pathlib
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import av
import numpy as np

from timeviper_jax.data.media import MediaLimits, VideoError, is_image
from timeviper_jax.data.workers import WorkerConfig, WorkerDied, WorkerPool

SIZE = 64
_MOST_FRAMES = 2_000
# Where a container counts no frames its duration is rounded by up to so many seconds.
_ROUNDED_SECONDS = 1.0


def examine(path: pathlib.Path, pool: WorkerPool) -> dict[str, Any]:
    """What came of reading all its frames, and how long it took."""
    began = time.monotonic()
    try:
        frames = _read(path, pool)
        found = dict(outcome="read", frames=frames)
    except WorkerDied as error:
        found = dict(outcome="died", reason=str(error))
    except VideoError as error:
        found = dict(outcome="refused", reason=str(error))
    found["seconds"] = round(time.monotonic() - began, 2)
    if "reason" in found:
        name = repr(str(path))[1:-1]
        found["named"] = name in found["reason"] and found["reason"].isprintable()
    return found


def _read(path: pathlib.Path, pool: WorkerPool) -> int:
    """How many different moments could be read, one of each frame it should have."""
    info = pool.probe(str(path))
    count = min(max(1, info.num_frames), _MOST_FRAMES)
    times = (np.arange(count) + 0.5) * (info.duration / count)
    return len(pool.read_frames(str(path), times, SIZE))


def new_pool(memory_bytes: int, seconds: int) -> WorkerPool:
    """One worker, within the benchmark's bounds."""
    cfg = WorkerConfig(
        count=1, memory_bytes=memory_bytes, cpu_seconds=seconds, wall_seconds=900
    )
    return WorkerPool(MediaLimits(), cfg)


class Counter:
    """Counts the frames of files in a process of its own, which may die of them."""

    def __init__(self, memory_bytes: int):
        self._memory = memory_bytes
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1, get_context("spawn"), _bound, (self._memory,), max_tasks_per_child=200
        )

    def is_short(self, path: pathlib.Path) -> bool:
        """Whether fewer frames come out than the file declares."""
        if path.is_dir() or is_image(path):
            return False  # An image is whole, or refused.
        try:
            counts = self._pool.submit(_count, str(path)).result()
        except BrokenProcessPool:
            # FFmpeg alone cannot tell; the workers did not die of it.
            self._pool = self._start()
            return False
        return counts["decoded"] < counts["declared"] - counts["slack"]

    def close(self) -> None:
        self._pool.shutdown()


def _bound(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 * memory_bytes, 4 * memory_bytes))


def _count(path: str) -> dict[str, int]:
    decoded = 0
    with av.open(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.base_rate or 0)
        seconds = float((stream.duration or 0) * (stream.time_base or 0))
        if container.duration:
            whole = container.duration / av.time_base
            seconds = min(seconds, whole) if seconds else whole
        declared, slack = stream.frames, 0
        if not declared:
            declared, slack = round(seconds * rate), round(_ROUNDED_SECONDS * rate)
        for packet in container.demux(stream):
            decoded += _frames(packet)
    return dict(decoded=decoded, declared=declared, slack=slack)


def _frames(packet: av.Packet) -> int:
    try:
        return len(packet.decode())
    except av.FFmpegError:
        return 0
