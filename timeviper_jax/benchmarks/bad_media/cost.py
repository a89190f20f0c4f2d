r"""What limits, checks and workers cost where all files are sound: frames a second.

python -m timeviper_jax.benchmarks.bad_media.cost --json

The same clips are decoded to the encoder's squares in three ways, which take turns:
  plain    a loop over PyAV that checks nothing
  limits   as training does by default (`LocalDecoder`): in its threads, within limits
  workers  as it does strangers' files (`WorkerPool`): in processes
Pixels must be the same. Each way is compared with the plain loop of its own round; the
median of the rounds is given, of the clock and of processor time, which others on the
machine disturb less. A share below 0 is faster than the plain loop.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float64, UInt8
from tqdm import tqdm

from timeviper_jax.benchmarks import trial
from timeviper_jax.data.images import Fit
from timeviper_jax.data.media import MediaLimits
from timeviper_jax.data.needle_sources import clip_path
from timeviper_jax.data.video import probe, sample_times
from timeviper_jax.data.workers import LocalDecoder, WorkerConfig, WorkerPool

_CLIPS = ("bigbuckbunny.mp4", "bikes.mp4")
_FRAMES = 32  # Of each reading of a clip, so near each other that nothing is sought.

Times = Float64[np.ndarray, "F"]
Read = Callable[[str, Times, Fit], UInt8[np.ndarray, "F S S 3"]]


class Spent(NamedTuple):
    wall: float  # Seconds.
    cpu: float


def plain(path: str, times: Times, fit: Fit) -> UInt8[np.ndarray, "F S S 3"]:
    """The frames on screen at `times`, from the first frame on, unchecked."""
    frames = np.empty((len(times), fit.size, fit.size, 3), np.uint8)
    converter = VideoReformatter()
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        decoded = container.decode(stream)
        shown, coming = None, next(decoded, None)
        for i, wanted in enumerate(times):
            while coming is not None and coming.time <= wanted:
                shown, coming = coming, next(decoded, None)
            rgb = converter.reformat(shown, format="rgb24", threads=1)
            frames[i] = fit(rgb.to_ndarray())
    return frames


def spend(read: Read, clips: Sequence[tuple[str, Times]], fit: Fit) -> Spent:
    """What reading all clips took, as many at once as there are cores."""
    wall, cpu = time.monotonic(), _cpu_seconds()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda clip: len(read(*clip, fit)), clips))
    return Spent(time.monotonic() - wall, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """Of this process and of those that it has started."""
    own = os.times()
    ticks = 0
    for children in pathlib.Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            # After the name, which may hold blanks: state is the first of the fields.
            fields = pathlib.Path("/proc", pid, "stat").read_text().rpartition(")")[2]
            ticks += sum(map(int, fields.split()[11:13]))
    return sum(own[:4]) + ticks / os.sysconf("SC_CLK_TCK")


def measure(rounds: int, repeats: int, fit: Fit) -> dict[str, Any]:
    """Shares of time that each way costs, beside the plain one."""
    paths = [str(clip_path(name)) for name in _CLIPS]
    clips = [
        (path, sample_times(probe(path).duration, _FRAMES)) for path in paths
    ] * repeats
    pool = WorkerPool(MediaLimits(), WorkerConfig(count=os.cpu_count() or 1))
    ways: dict[str, Read] = dict(
        plain=plain,
        limits=LocalDecoder(MediaLimits()).read_frames,
        workers=pool.read_frames,
    )
    for read in ways.values():  # Starts the workers, too.
        spend(read, clips[: len(paths)] * 2, fit)
        for path, times in clips[: len(paths)]:
            if not np.array_equal(read(path, times, fit), plain(path, times, fit)):
                raise ValueError(f"{path}: the ways to read it give other pixels.")
    spent: dict[str, list[Spent]] = {name: [] for name in ways}
    for number in tqdm(range(rounds), desc="rounds"):
        names = list(ways)
        for name in names[number % 3 :] + names[: number % 3]:
            spent[name].append(spend(ways[name], clips, fit))
    pool.close()
    count = len(clips) * _FRAMES
    return {name: _summary(s, spent["plain"], count) for name, s in spent.items()}


def _summary(
    spent: Sequence[Spent], plain_spent: Sequence[Spent], frames: int
) -> dict[str, Any]:
    pairs = list(zip(spent, plain_spent, strict=True))
    wall = [one.wall / other.wall - 1 for one, other in pairs]
    cpu = [one.cpu / other.cpu - 1 for one, other in pairs]
    median = Spent(*map(statistics.median, zip(*spent, strict=True)))
    return dict(
        frames_per_second=round(frames / median.wall, 1),
        cpu_ms_per_frame=round(1e3 * median.cpu / frames, 3),
        cost_wall=round(statistics.median(wall), 4),
        cost_cpu=round(statistics.median(cpu), 4),
        cost_cpu_of_rounds=[round(share, 4) for share in cpu],
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="in which all take turns")
    parser.add_argument("--repeats", type=int, default=4, help="of each clip a round")
    parser.add_argument("--size", type=int, default=384, help="pixels a side")
    parser.add_argument("--json", action="store_true", help="print the whole report")
    args = parser.parse_args(argv)
    found = measure(args.rounds, args.repeats, Fit(size=args.size))
    if not args.json:
        for name, one in found.items():
            print(f"{name}: {one['cost_wall']:+.1%} wall, {one['cost_cpu']:+.1%} cpu")
        return
    report = dict(
        **trial.when_and_where(),
        versions=dict(python=platform.python_version(), av=av.__version__),
        size=args.size,
        **found,
    )
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
