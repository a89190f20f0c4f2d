"""What one process measures of one length of video, so that its memory is its own.

`start_up` only loads the model; `compile` leaves programs in JAX's cache of them.
`watch` decodes, encodes and watches the first frames of the film and asks twice; done
again with the same store it finds them encoded. `open_ended` feeds that many frames,
the film over and over.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from timeviper_jax import sharding
from timeviper_jax.benchmarks.long_video import film
from timeviper_jax.data import frames
from timeviper_jax.data.ahead import Ahead
from timeviper_jax.data.conversation import NANO
from timeviper_jax.data.examples import FrameFeatures
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.data.video import VideoError
from timeviper_jax.evals import run as runs
from timeviper_jax.evals import watched
from timeviper_jax.inference.encode import encoding, fingerprint
from timeviper_jax.inference.memory import Memory
from timeviper_jax.inference.open_ended import (
    OpenEndedConfig,
    OpenEndedVideo,
    split_around,
)
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer
from timeviper_jax.llm.transv import Stage
from timeviper_jax.presets import find_config
from timeviper_jax.timeviper import TimeViper

MIB = 1 << 20
ANSWER_TOKENS = 16
SAMPLES = 100  # Of the memory of an open-ended video.
# The demo's compression, for a preset that has none: nine vision tokens in ten go.
_TRANSV = (Stage(layer=1, keep=0.1, select="uniform"),)


def load(workdir: str, preset: str, store: pathlib.Path) -> runs.Run:
    """A trained run, or random weights of a preset, with a store of its own."""
    if workdir:
        run = runs.load(workdir)
        mark = fingerprint(run.model)
        return dataclasses.replace(run, features=FeatureStore(store, mark))
    cfg = find_config(preset)
    if not cfg.llm.transv:
        cfg = cfg.with_transv(_TRANSV)
    model = nnx.jit(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))()
    return runs.Run(
        model=model,
        tokenizer=ByteTokenizer(),
        template=NANO,
        features=FeatureStore(store, fingerprint(model)),
        mesh=sharding.make_mesh(fsdp=-1),
        config={"data": {"encode_batch": 256, "num_threads": 1}},
    )


def resident_bytes(which: str = "VmRSS") -> int:
    """Of this process now, or at most so far ("VmHWM"); Linux only."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == which:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/self/status has no {which!r}.")


class Clock:
    """Seconds spent in each part, of however many threads."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def items(self, name: str, items: Generator) -> Generator:
        with contextlib.closing(items):
            while True:
                with self(name):
                    item = next(items, None)
                if item is None:
                    return
                yield item

    def calls(self, name: str, function: Callable) -> Callable:
        def timed(*args):
            with self(name):
                return function(*args)

        return timed


class Waited:
    """Features whose reader's waiting is counted."""

    def __init__(self, features: FrameFeatures, clock: Clock):
        self.shape = features.shape
        self._features, self._clock = features, clock

    def __getitem__(self, here: slice) -> np.ndarray:
        with self._clock("waiting"):
            return self._features[here]


class Nothing:
    """Features of frames that show nothing, which take no room."""

    def __init__(self, frames: int, run: runs.Run):
        cfg = run.model.cfg
        self.shape = (frames, cfg.tokens_per_frame, cfg.projector.vision_dim)

    def __getitem__(self, here: slice) -> np.ndarray:
        start, stop, _ = here.indices(self.shape[0])
        return np.zeros((stop - start, *self.shape[1:]), np.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watcher:
    """A model beside the film, for videos of one length."""

    run: runs.Run
    film: pathlib.Path
    times: np.ndarray

    asking = watched.Asking(
        # No token stops an answer: all are of one length.
        decoding=Decoding(max_tokens=ANSWER_TOKENS, stop_ids=()),
    )

    @contextlib.contextmanager
    def encoded(self, clock: Clock) -> Iterator[FrameFeatures]:
        """As `run.encoded`, with a clock beside each part."""
        run, cfg = self.run, self.run.model.cfg
        if kept := run.features.find(self.film, self.times):
            yield kept
            return
        file = run.features.grow(
            self.film,
            self.times,
            tokens=cfg.tokens_per_frame,
            width=cfg.projector.vision_dim,
        )
        batches = frames.frame_batches(
            self.film, self.times, cfg.fit, size=run.config["data"]["encode_batch"]
        )
        encode = clock.calls("encode", run.encoder())
        bar = tqdm(total=len(file), desc="encode", unit="frame", disable=None)
        with (
            bar,
            encoding(
                clock.items("decode", batches), encode, file, on_frames=bar.update
            ) as arriving,
        ):
            yield arriving

    def watch(self, viewer: Viewer, features: FrameFeatures) -> watched.Watched:
        example = watched.watched_example(self.run, self.asking, self.times, features)
        memory = viewer.watch([example])
        jax.block_until_ready([s.cache for s in memory.stretches])
        return watched.Watched(
            run=self.run,
            asking=self.asking,
            num_frames=len(self.times),
            viewer=viewer,
            memory=memory,
        )

    def compile(self, viewer: Viewer) -> None:
        """Runs every program once that this length of video needs."""
        size = self.run.model.cfg.fit.size
        self.run.encoder()(np.zeros((1, size, size, 3), np.uint8))
        self.watch(viewer, Nothing(len(self.times), self.run)).ask(film.QUESTION)

    def measure(self) -> dict[str, Any]:
        clock, viewer = Clock(), watched.make_viewer(self.run, self.asking)
        with clock("programs"):
            self.compile(viewer)
        with clock("watch"), self.encoded(clock) as features:
            video = self.watch(viewer, Waited(features, clock))
        with clock("answer"):
            answer = video.ask(film.QUESTION)
        with clock("second answer"):
            video.ask(film.QUESTION)
        clock.seconds["prefill"] = clock.seconds["watch"] - clock.seconds["waiting"]
        return {
            "answer": answer,
            "seconds": dict(clock.seconds),
            "kept_bytes": kept_bytes(video.memory),
            "filled_bytes": kept_bytes(video.memory, filled=True),
            "encoded_bytes": 2 * int(np.prod(features.shape)),
        }


def kept_bytes(memory: Memory, *, filled: bool = False) -> dict[str, int]:
    return {name: int(size) for name, size in memory.parts(filled=filled).items()}


def over_and_over(
    path: pathlib.Path, seconds: int, run: runs.Run
) -> Generator[np.ndarray, None, None]:
    """Batches of the film's frames, from its start again after its end."""
    times, size = np.arange(seconds) + 0.5, run.config["data"]["encode_batch"]
    while True:
        yield from frames.frame_batches(path, times, run.model.cfg.fit, size=size)


def open_ended(
    run: runs.Run, path: pathlib.Path, seconds: int, length: int
) -> dict[str, Any]:
    """Feeds `length` frames, and asks at the start, half-way and at the end."""
    asking = Watcher.asking
    prompt = watched.make_prompt(run, asking, 1, film.QUESTION)
    before, question = split_around(prompt)
    cfg = OpenEndedConfig(expected_frames=length)
    video = OpenEndedVideo(watched.make_viewer(run, asking), before, cfg)
    samples, answers, due = [], [], 0
    start = time.perf_counter()
    bar = tqdm(total=length, desc="open-ended", unit="frame", disable=None)
    with bar, Ahead(over_and_over(path, seconds, run), most=2) as decoded:
        while video.num_frames < length:
            features = run.encoder()(next(decoded)[: length - video.num_frames])
            first = video.num_frames
            video.feed(features, first + np.arange(len(features)) + 0.5)
            bar.update(len(features))
            if video.num_frames >= due:
                due = video.num_frames + length // SAMPLES
                samples.append(_sample(video, time.perf_counter() - start))
            if video.num_frames >= len(answers) * length // 2:
                asked = time.perf_counter()
                video.ask([question], decoding=asking.decoding)
                answers.append((video.num_frames, time.perf_counter() - asked))
    samples.append(_sample(video, time.perf_counter() - start))
    return {
        "samples": samples,
        "answers": answers,
        "filled_bytes": kept_bytes(video.memory, filled=True),
        "block_frames": video.cfg.block_frames,
        "policy": video.cfg.policy,
    }


def _sample(video: OpenEndedVideo, seconds: float) -> dict[str, float]:
    kept = kept_bytes(video.memory)
    return {
        "frames": video.num_frames,
        "seconds": seconds,
        "resident_bytes": resident_bytes(),
        "cache_bytes": kept["attention"] + kept["transfer"] + kept["residual"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add, folder = parser.add_argument, pathlib.Path
    add("part", choices=("start_up", "compile", "watch", "open_ended"))
    add("lengths", type=int, nargs="*")
    add("--workdir", default="")
    add("--preset", default="small")
    add("--film", type=folder, required=True)
    add("--film_frames", type=int, required=True)
    add("--store", type=folder, required=True)
    args = parser.parse_args(argv)
    try:
        results = _measured(args)
    except (FileNotFoundError, ValueError, VideoError) as error:
        sys.exit(f"error: {error}")
    json.dump(results | {"peak_bytes": resident_bytes("VmHWM")}, sys.stdout)


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    run = load(args.workdir, args.preset, args.store)
    results: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    for length in args.lengths:
        watcher = Watcher(run=run, film=args.film, times=np.arange(length) + 0.5)
        if args.part == "compile":
            watcher.compile(watched.make_viewer(run, watcher.asking))
        elif args.part == "watch":
            results |= watcher.measure()
        else:
            results |= open_ended(run, args.film, args.film_frames, length)
    return results


if __name__ == "__main__":
    main()
