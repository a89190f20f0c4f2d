"""Decoding strangers' files in processes that may die, and are then replaced."""

import dataclasses
import fcntl
import functools
import json
import mmap
import os
import pathlib
import queue
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from timeviper_jax.data import video
from timeviper_jax.data.images import Fit, as_fit
from timeviper_jax.data.media import MediaLimits, Number, VideoError
from timeviper_jax.data.video import VideoInfo
from timeviper_jax.data.worker import LENGTH_BYTES, OUT_OF_MEMORY, slots

_ROOM_BYTES = 1 << 24  # For frames on their way out of a worker.
# A frame's memory serves the next one, instead of being given back and asked for again:
# a tenth of the time that it takes to decode one. The first is the most glibc takes.
_KEEP_FREED_MEMORY = dict(
    MALLOC_MMAP_THRESHOLD_=str(1 << 25), MALLOC_TRIM_THRESHOLD_=str(1 << 28)
)
_LONGEST_TEXT = 1 << 16


class WorkerDied(VideoError):
    """A file on which a worker died: of a fault, or of a bound on memory or time."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: the process that decoded it {reason}.")
        self.path = path


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How many processes decode, and what each may take for one file.

    Processor time, so that a machine that stands still for a while ends nobody;
    the clock only catches a read that never returns.
    """

    count: int = 0  # 0: files are decoded by whoever asks, unbounded.
    memory_bytes: int = 4 << 30  # Address space, beyond that of an idle worker.
    cpu_seconds: Number = 120
    wall_seconds: Number = 1_200

    def __post_init__(self):
        if (
            self.count < 0
            or min(self.memory_bytes, self.cpu_seconds, self.wall_seconds) <= 0
        ):
            raise ValueError(f"{self} must allow for some memory and time.")


@runtime_checkable
class Decoder(Protocol):
    """Who gives frames of files, as the functions of `video` do, with their errors."""

    def probe(self, path: str) -> VideoInfo: ...

    def read_frames(
        self, path: str, times: Sequence[float] | np.ndarray, fit: Fit | int
    ) -> UInt8[np.ndarray, "F S S 3"]: ...


@dataclasses.dataclass(frozen=True)
class LocalDecoder:
    """Decodes where it is called."""

    limits: MediaLimits

    def __post_init__(self):
        object.__setattr__(self, "probe", _remembering(self.probe))

    def probe(self, path: str) -> VideoInfo:
        return video.probe(path, self.limits)

    def read_frames(
        self, path: str, times: Sequence[float] | np.ndarray, fit: Fit | int
    ) -> UInt8[np.ndarray, "F S S 3"]:
        return video.read_frames(path, times, fit, limits=self.limits)


class WorkerPool:
    """Decodes in `cfg.count` processes; from any number of threads.

    Workers are started when first needed. One that dies is replaced when next needed.
    """

    def __init__(self, limits: MediaLimits, cfg: WorkerConfig):
        self._limits, self._cfg = limits, cfg
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(cfg.count):
            self._idle.put(None)
        self.probe = _remembering(self._probe)

    def read_frames(
        self, path: str, times: Sequence[float] | np.ndarray, fit: Fit | int
    ) -> UInt8[np.ndarray, "F S S 3"]:
        fit, times = as_fit(fit), np.asarray(times, np.float64)
        if np.any(np.diff(times) < 0):
            raise ValueError("Frames are read forwards; sort the times.")
        if 3 * fit.size**2 > _ROOM_BYTES:
            raise ValueError(
                f"A frame of {fit.size} pixels a side takes more than {_ROOM_BYTES}"
                " bytes, all that workers have room for; decode with workers.count=0."
            )
        frames = np.empty((len(times), fit.size, fit.size, 3), np.uint8)
        request = dict(
            op="frames",
            path=str(path),
            times=times.tolist(),
            fit=dataclasses.asdict(fit),
        )
        self._ask(request, frames)
        return frames

    def close(self) -> None:
        """Ends the workers that are idle."""
        for _ in range(self._cfg.count):
            worker = self._idle.get()
            if worker is not None:
                worker.end()
            self._idle.put(None)

    def _probe(self, path: str) -> VideoInfo:
        return VideoInfo(**self._ask(dict(op="probe", path=str(path)), None))

    def _ask(self, request: Mapping[str, Any], frames: np.ndarray | None) -> Any:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker(self._limits, self._cfg)
            return worker.ask(request, frames)
        finally:
            alive = worker is not None and worker.in_step
            if worker is not None and not alive:
                worker.end()
            self._idle.put(worker if alive else None)


def _remembering(probe: Callable[[str], VideoInfo]) -> Callable[[str], VideoInfo]:
    """`probe`, which opens a file once, and again when it has changed.

    Opening takes a millisecond, and many questions are about one video.
    """
    known = functools.lru_cache(1 << 16)(lambda path, version: probe(path))
    return lambda path: known(path, _version(path))


def _version(path: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None  # To open it will say what is wrong.
    return stat.st_size, stat.st_mtime_ns


@functools.cache
def decoder(limits: MediaLimits, cfg: WorkerConfig) -> Decoder:
    """The one decoder of these bounds; its workers live as long as this process."""
    return WorkerPool(limits, cfg) if cfg.count else LocalDecoder(limits)


class _Worker:
    """One process. It is `in_step` while no answer is outstanding."""

    def __init__(self, limits: MediaLimits, cfg: WorkerConfig):
        self._cfg = cfg
        room = _shared_memory()
        self._room = np.frombuffer(mmap.mmap(room, 0, prot=mmap.PROT_READ), np.uint8)
        settings = json.dumps(
            dict(
                limits=dataclasses.asdict(limits),
                memory_bytes=cfg.memory_bytes,
                cpu_seconds=cfg.cpu_seconds,
                room=room,
            )
        )
        # Threads of a linear algebra library would reserve memory that it never uses.
        env = dict(
            PYTHONPATH=os.pathsep.join(
                str(pathlib.Path(p).absolute()) for p in sys.path
            ),
            LD_LIBRARY_PATH=os.environ.get("LD_LIBRARY_PATH", ""),
            OPENBLAS_NUM_THREADS="1",
            OMP_NUM_THREADS="1",
            **_KEEP_FREED_MEMORY,
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "timeviper_jax.data.worker", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            bufsize=0,
            pass_fds=[room],
        )
        os.close(room)
        self._end = weakref.finalize(self, _end, self._process)
        self.in_step = True

    def end(self) -> None:
        self._end()

    def ask(self, request: Mapping[str, Any], frames: np.ndarray | None) -> Any:
        """Fills `frames`, or returns what a probe found."""
        self.in_step = False
        self._path = request["path"]
        self._deadline = time.monotonic() + self._cfg.wall_seconds
        self._say(json.dumps(request))
        found = self._frames(frames) if frames is not None else self._told(b"P")
        self.in_step = True
        return found

    def _say(self, text: str) -> None:
        try:
            self._process.stdin.write(text.encode() + b"\n")
        except BrokenPipeError as error:
            raise self._died() from error

    def _frames(self, frames: UInt8[np.ndarray, "F S S 3"]) -> None:
        places = slots(self._room, frames.shape[1])
        for start in range(0, len(frames), len(places)):
            left = frames[start : start + len(places)]
            self._expect(b"F")
            left[:] = places[: len(left)]
            if start + len(left) < len(frames):
                self._say("")
        self._expect(b"D")

    def _told(self, kind: bytes) -> Any:
        self._expect(kind)
        return self._text()

    def _expect(self, kind: bytes) -> None:
        """Reads what the next answer is, and raises the error if it is one."""
        said = self._read(1)
        if said == b"E":
            message = str(self._text())
            self.in_step = True
            raise VideoError(message)
        if said != kind:
            raise self._died("made no sense")

    def _text(self) -> Any:
        length = int.from_bytes(self._read(LENGTH_BYTES), "little")
        if length > _LONGEST_TEXT:
            raise self._died("made no sense")
        try:
            return json.loads(self._read(length))
        except (ValueError, RecursionError) as error:
            raise self._died("made no sense") from error

    def _read(self, count: int) -> bytes:
        pipe, said = self._process.stdout, b""
        ready = select.poll()
        ready.register(pipe, select.POLLIN)
        while len(said) < count:
            left = max(0.0, self._deadline - time.monotonic())
            if not ready.poll(1000 * left):
                raise self._died(f"took over {self._cfg.wall_seconds:g} s")
            more = pipe.read(count - len(said))
            if not more:
                raise self._died()
            said += more
        return said

    def _died(self, reason: str | None = None) -> WorkerDied:
        if reason is None:
            reason = _reason(self._process.wait(), self._cfg)
        return WorkerDied(self._path, reason)


def _shared_memory() -> int:
    """A file in memory for frames; nobody can cut it off under who reads it."""
    room = os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(room, _ROOM_BYTES)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(room, fcntl.F_ADD_SEALS, seals)
    return room


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def _reason(status: int, cfg: WorkerConfig) -> str:
    """Why a process ended, by its status."""
    if status == -signal.SIGPROF:
        return f"took over {cfg.cpu_seconds:g} s of processor time"
    if status == OUT_OF_MEMORY:
        return f"asked for more than {cfg.memory_bytes / 2**30:.3g} GiB of memory"
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    return f"ended with status {status}"
