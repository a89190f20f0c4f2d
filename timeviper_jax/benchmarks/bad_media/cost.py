r"""What limits, checks and workers cost where all files are sound.

python -m timeviper_jax.benchmarks.bad_media.cost --json

Clips and photographs become rows of a batch, from opening the file to the arrays that
a training step takes, each time as if it had never been seen, in three ways:
  plain    what gives the frames with the least work, and checks nothing
  limits   as training does by default: in its threads, within limits
  workers  as it does strangers' files: in processes
The ways take turns, file by file, in every order. A round of all files compares each
way with the plain one; the median of the rounds is given, and where it may lie (95 %,
by drawing the rounds again), for
  alone     processor time, of all processes, while one thread makes one row at a time
  together  the clock, while as many threads as there are cores make rows
A share below 0 is less than the plain way takes.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import numpy as np
import yaml
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from timeviper_jax.benchmarks import paired, trial
from timeviper_jax.data import manifest
from timeviper_jax.data.examples import Batch, collate
from timeviper_jax.data.images import Fit
from timeviper_jax.data.items import Item
from timeviper_jax.data.media import MediaLimits, is_image
from timeviper_jax.data.needle_sources import clip_path, photo_path
from timeviper_jax.data.pipeline import DataConfig, load_example
from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.data.video import VideoInfo
from timeviper_jax.data.workers import Decoder, LocalDecoder, WorkerConfig, WorkerPool

_CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
_PHOTOS = ("astronaut", "coffee")
# So near each other that nothing is sought, which the plain way cannot.
_FRAMES_PER_SECOND, _FRAMES = 4, 40


class Unchecked:
    """Frames with the least work: each file is opened once, and believed."""

    def __init__(self):
        self._here = threading.local()

    def probe(self, path: str) -> VideoInfo:
        if is_image(path):
            with Image.open(path) as image:
                size = dict(height=image.height, width=image.width)
                return VideoInfo(duration=1.0, num_frames=1, fps=1.0, **size)
        # It stays open for the frames that are asked for next.
        container = self._here.container = av.open(path)
        stream = container.streams.video[0]
        return VideoInfo(
            duration=float(stream.duration * stream.time_base),
            num_frames=stream.frames,
            fps=float(stream.average_rate),
            height=stream.codec_context.height,
            width=stream.codec_context.width,
        )

    def read_frames(
        self, path: str, times: Sequence[float] | np.ndarray, fit: Fit
    ) -> UInt8[np.ndarray, "F S S 3"]:
        frames = np.empty((len(times), fit.size, fit.size, 3), np.uint8)
        if is_image(path):
            with Image.open(path) as image:
                ImageOps.exif_transpose(image, in_place=True)
                frames[:] = fit(np.asarray(image.convert("RGB")))
            return frames
        converter = VideoReformatter()
        with self._here.container as container:
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


class Work:
    """The input of a training step: a row for each medium."""

    def __init__(self, folder: pathlib.Path, size: int):
        self._folder, self._tokenizer = folder, ByteTokenizer()
        self._cfg = DataConfig(
            manifest=str(folder / "data.yaml"),
            batch_size=1,
            num_frames=_FRAMES,
            text_tokens=128,
            tokens_per_frame=16,
            fit=Fit(size=size),
        )
        self._write([*map(clip_path, _CLIPS), *map(photo_path, _PHOTOS)])
        self.items = manifest.load(self._cfg.manifest, self._cfg.split)

    def _write(self, sources: Sequence[pathlib.Path]) -> None:
        """Copies of the media, and a manifest of them."""
        for source in sources:
            shutil.copyfile(source, self._folder / source.name)
        talk = [
            {"from": "human", "value": "<image>\nWhat can be seen here?"},
            {"from": "gpt", "value": "A bird, a beach, a street or a cup of coffee."},
        ]
        items = [dict(image=s.name, conversations=talk) for s in sources]
        (self._folder / "items.json").write_text(json.dumps(items))
        entry = dict(name="sound", format="conversation", json_path="items.json")
        entry["video_sample_type"] = f"fps{_FRAMES_PER_SECOND}"
        (self._folder / "data.yaml").write_text(yaml.safe_dump({"data": [entry]}))

    def make(self, media: Decoder, item: Item) -> Batch:
        """The item's row."""
        rng = np.random.default_rng(0)
        example = load_example(item, self._cfg, self._tokenizer, rng, media=media)
        return collate([[example]], self._cfg.row)

    def forget(self) -> None:
        """Makes every file one that was never seen."""
        for path in self._folder.iterdir():
            os.utime(path)


Seconds = dict[str, list[float]]  # Of each way, round by round.


def alternate(
    rounds: int,
    ways: Mapping[str, Callable[[Any], object]],
    parts: Sequence[Any],
    clock: Callable[[], float],
) -> Seconds:
    """What each way takes for all parts; at each part all take their turn."""
    taken: Seconds = {name: [] for name in ways}
    orders = itertools.cycle(itertools.permutations(ways))
    for order in tqdm(itertools.islice(orders, rounds), total=rounds):
        for name in ways:
            taken[name].append(0.0)
        for part, name in itertools.product(parts, order):
            began = clock()
            ways[name](part)
            taken[name][-1] += clock() - began
    return taken


def processor_seconds() -> float:
    """Of this process and of those that it has started."""
    total = time.process_time()
    for children in pathlib.Path("/proc/self/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            # The clock of another process, as clock_getcpuclockid(3) numbers it.
            total += time.clock_gettime(~pid << 3 | 2)
    return total


def measure(work: Work, rounds: int) -> dict[str, dict[str, Any]]:
    """Shares of time that limits and workers cost, alone and together."""
    cores = os.cpu_count() or 1
    pool = WorkerPool(MediaLimits(), WorkerConfig(count=cores))
    media: dict[str, Decoder] = dict(
        plain=Unchecked(), limits=LocalDecoder(MediaLimits()), workers=pool
    )
    for item in work.items:
        rows = {name: work.make(decoder, item) for name, decoder in media.items()}
        for name, row in rows.items():
            if not np.array_equal(row.frames, rows["plain"].frames):
                raise ValueError(f"{item.id}: {name} gives other pixels than plain.")

    def one(decoder: Decoder, item: Item) -> None:
        work.forget()
        work.make(decoder, item)

    def many(decoder: Decoder, items: Sequence[Item]) -> None:
        work.forget()
        list(threads.map(functools.partial(work.make, decoder), items))

    everything = work.items * cores
    with ThreadPoolExecutor(cores) as threads:
        many(pool, everything)  # Starts all workers.
        bind = lambda use: {
            name: functools.partial(use, decoder) for name, decoder in media.items()
        }
        alone = alternate(rounds, bind(one), work.items, processor_seconds)
        together = alternate(rounds, bind(many), [everything], time.monotonic)
    pool.close()
    return {
        name: dict(
            plain_seconds=round(statistics.median(taken["plain"]), 5),
            **paired.shares(taken, "plain"),
        )
        for name, taken in dict(alone=alone, together=together).items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=48, help="in which all take turns"
    )
    parser.add_argument("--size", type=int, default=384, help="pixels a side")
    parser.add_argument("--json", action="store_true", help="print the whole report")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Work(pathlib.Path(folder), args.size), args.rounds)
    if not args.json:
        for how, ways in found.items():
            for name in ("limits", "workers"):
                low, high = ways[name]["interval"]
                median = ways[name]["median"]
                print(f"{how}, {name}: {median:+.1%} ({low:+.1%} to {high:+.1%})")
        return
    report = dict(
        **trial.when_and_where(),
        versions=dict(python=platform.python_version(), av=av.__version__),
        rounds=args.rounds,
        size=args.size,
        **found,
    )
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
