"""A process that decodes one file at a time within bounds, for `workers.WorkerPool`.

python -m timeviper_jax.data.worker SETTINGS  (JSON: limits, memory_bytes, cpu_seconds)

It reads requests, a JSON line each, from stdin and answers on stdout:
  P, a length and JSON   what `probe` found
  F                      memory that both share holds the next frames, S x S x 3 bytes
                         each: as many as there is room for, or all that are left;
                         where there are more, an empty line says that these are taken
  D                      that was the last of them
  E, a length and JSON   why the file cannot give what was asked
Nothing that a file can make it say is run or unpickled by whoever reads the answers.
It may write no file, dump no core, and take no more memory and, for one request, no
more processor time than it was told; what breaks a bound ends it.
"""

import dataclasses
import json
import mmap
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8

from timeviper_jax.data.images import Fit
from timeviper_jax.data.media import MediaLimits, VideoError
from timeviper_jax.data.video import iter_frames, probe

LENGTH_BYTES = 4
OUT_OF_MEMORY = 71  # The status of a worker that was refused memory.


def bound(memory_bytes: int) -> None:
    """Gives up, for good, what decoding does not need."""
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    most = taken + memory_bytes
    for kind, limit in (
        (resource.RLIMIT_AS, most),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


class Line(NamedTuple):
    """What a worker shares with whoever asks."""

    requests: BinaryIO
    answers: BinaryIO
    room: UInt8[np.ndarray, "N"]  # For frames.


def slots(
    room: UInt8[np.ndarray, "N"], size: int
) -> UInt8[np.ndarray, "_ {size} {size} 3"]:
    """The places for frames that there is room for."""
    each = 3 * size * size
    return room[: len(room) // each * each].reshape(-1, size, size, 3)


def answer(request: Mapping[str, Any], limits: MediaLimits, line: Line) -> None:
    """Answers one request; an error may come after some of its frames."""
    try:
        if request["op"] == "probe":
            info = dataclasses.asdict(probe(request["path"], limits))
            _tell(line.answers, b"P", info)
            return
        fit = Fit(**{**request["fit"], "fill": tuple(request["fit"]["fill"])})
        frames = iter_frames(request["path"], request["times"], fit, limits=limits)
        _hand_over(frames, len(request["times"]), slots(line.room, fit.size), line)
        line.answers.write(b"D")
    except VideoError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from error
        _tell(line.answers, b"E", str(error))


def _hand_over(
    frames: Iterator[UInt8[np.ndarray, "S S 3"]],
    count: int,
    places: UInt8[np.ndarray, "_ S S 3"],
    line: Line,
) -> None:
    for done, frame in enumerate(frames, start=1):
        places[(done - 1) % len(places)] = frame
        if done == count or done % len(places) == 0:
            line.answers.write(b"F")
            line.answers.flush()
            if done < count:
                line.requests.readline()


def _tell(out: BinaryIO, kind: bytes, value: Any) -> None:
    text = json.dumps(value).encode()
    out.write(kind + len(text).to_bytes(LENGTH_BYTES, "little") + text)


def main() -> None:
    settings = json.loads(sys.argv[1])
    bounds = settings["limits"]
    for name in ("containers", "codecs"):
        bounds[name] = tuple(bounds[name])
    limits = MediaLimits(**bounds)
    # Its own end of the answers: nothing that is printed gets between them.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    room = np.frombuffer(mmap.mmap(settings["room"], 0), np.uint8)
    line = Line(sys.stdin.buffer, out, room)
    bound(settings["memory_bytes"])
    for request in line.requests:
        # Its signal ends the process, in whatever call it is.
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_seconds"])
        try:
            answer(json.loads(request), limits, line)
            out.flush()
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
