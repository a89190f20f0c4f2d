"""Watches a video of random pixels, and answers about it, on the device at hand.

Weights are random, made on the device. Each setting has a process of its own, so that
the most memory is its own too. Programs are compiled in a first pass; a second is timed
as it is used, and a third part by part, each program waited for.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx

from timeviper_jax.benchmarks.prefill import settings
from timeviper_jax.benchmarks.prefill.calls import (
    DECODE,
    PROJECTOR,
    QUESTION,
    TRANSV,
    VISION,
    Setting,
    part_of,
)
from timeviper_jax.benchmarks.prefill.plan import encoder_of
from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Example, Role
from timeviper_jax.inference import memory, programs
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer
from timeviper_jax.timeviper import TimeViper, TimeViperConfig

HOST = "host"  # What is left of the time: choosing, copying, waiting.


def measure_apart(options: dict) -> dict:
    """`measure` in another process.

    Raises:
      RuntimeError: It failed; the end of what it said.
    """
    command = [sys.executable, "-m", __name__, json.dumps(options)]
    package = str(pathlib.Path(__file__).parents[3])
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{options}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: dict) -> dict:
    """Seconds and most memory of one setting, `settings.make`'s arguments."""
    setting = settings.make(**options)
    model = random_model(setting.sizes)
    viewer = Viewer(model, setting.viewer)
    video = _Video(setting, model)
    first = _pass(viewer, video, more=True)
    found = _pass(viewer, video, more=True)
    with timed(viewer) as parts:
        apart = _pass(viewer, video, more=False)
    spent = apart["watch"] + apart["first_answer"]
    parts |= {VISION: apart["vision"], HOST: spent - sum(parts.values())}
    more = found["more"] - found["first_answer"]
    return {
        "frames": setting.frames,
        "tokens": setting.tokens,
        "transv": options["transv"],
        "device": jax.devices()[0].device_kind,
        "pixels": "random, one batch again and again: nothing is decoded",
        "seconds": _rounded(found["vision"] + found["watch"] + found["first_answer"]),
        "vision_seconds": _rounded(found["vision"]),
        "watch_seconds": _rounded(found["watch"]),
        "first_token_seconds": _rounded(found["first_answer"]),
        "tokens_per_second": _rounded((setting.answer - 1) / max(more, 1e-9)),
        "compile_seconds": _rounded(sum(first.values()) - sum(found.values())),
        "parts": {part: _rounded(seconds) for part, seconds in parts.items()},
        **most_memory(),
    }


def random_model(sizes: TimeViperConfig) -> TimeViper:
    """A model whose parameters are made where they are used, in one program."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: TimeViper(sizes, rngs=nnx.Rngs(0))))
    draw = jax.jit(lambda: nnx.state(TimeViper(sizes, rngs=nnx.Rngs(0)), nnx.Param))
    return nnx.merge(graph, draw())


def most_memory() -> dict[str, Any]:
    """The most that was used so far: of the device, or where it does not say, of us."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        size, of = stats["peak_bytes_in_use"], "device"
    else:
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        of = "process"
    return {"peak_gib": round(size / 2**30, 3), "memory_of": of}


class _Video:
    """Frames of random pixels: of one batch, so that any number fits in memory."""

    def __init__(self, setting: Setting, model: TimeViper):
        self.setting = setting
        graph, self._params = nnx.split(model)
        self._encode = encoder_of(graph)
        size = setting.sizes.vision.image_size
        shape = setting.batch, size, size, 3
        rng = np.random.default_rng(0)
        self._pixels = rng.integers(256, size=shape, dtype=np.uint8)

    def example(self) -> Example:
        """Encodes all frames."""
        setting = self.setting
        batches = range(math.ceil(setting.frames / setting.batch))
        features = [self._encode(self._params, self._pixels) for _ in batches]
        features = np.concatenate(jax.device_get(features))[: setting.frames]
        roles = [Role.TEXT] * setting.prefix + [Role.VISION] * setting.vision_tokens
        return Example(
            tokens=np.ones(len(roles), np.int32),
            roles=np.array(roles, np.int32),
            loss_mask=np.zeros(len(roles), bool),
            frame_times=np.arange(setting.frames, dtype=np.float32),
            features=features,
        )

    def question(self) -> EncodedText:
        length = self.setting.question
        return EncodedText(
            tokens=np.ones(length, np.int32),
            roles=np.full(length, Role.INSTRUCTION, np.int32),
            loss_mask=np.zeros(length, bool),
        )


def _pass(viewer: Viewer, video: _Video, *, more: bool) -> dict[str, float]:
    """Seconds of each step: a video, a token of an answer, and `more` of one."""
    seconds, clock = {}, time.perf_counter

    def step(name: str, run: Callable) -> Any:
        start = clock()
        result = run()
        jax.block_until_ready(viewer.reader.params)
        seconds[name] = clock() - start
        return result

    example = step("vision", video.example)
    state = step("watch", lambda: _ready(viewer.watch([example])))
    lengths = {"first_answer": 1} | ({"more": video.setting.answer} if more else {})
    for name, tokens in lengths.items():
        decoding = Decoding(max_tokens=tokens)
        ask = lambda: viewer.ask(state, [video.question()], decoding=decoding)  # noqa: B023
        step(name, ask)
    return seconds


def _ready(state: memory.Memory) -> memory.Memory:
    caches = [stretch.cache for stretch in state.stretches]
    jax.block_until_ready((caches, [passage.waiting for passage in state.passages]))
    return state


@contextlib.contextmanager
def timed(viewer: Viewer) -> Iterator[dict[str, float]]:
    """Waits for each program of a viewer, and adds up its seconds by part."""
    reader, parts = viewer.reader, {}

    def wrapped(function: Callable, part_of_call: Callable) -> Callable:
        def run(*args):
            jax.block_until_ready(args)
            start = time.perf_counter()
            result = jax.block_until_ready(function(*args))
            part = part_of_call(*args)
            parts[part] = parts.get(part, 0) + time.perf_counter() - start
            return result

        return run

    def part_of_run(params, x, ids, cache, layers):
        return part_of(layers) if x.shape[1] == reader.cfg.chunk else QUESTION

    always = lambda part: lambda *args: part
    run_on = {
        name: wrapped(getattr(reader.run_on, name), always(part))
        for name, part in (
            ("embed", PROJECTOR),
            ("embed_text", QUESTION),
            ("rank", TRANSV),
            ("write", DECODE),
        )
    }
    run_on["run"] = wrapped(reader.run_on.run, part_of_run)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (reader, "run_on", dataclasses.replace(reader.run_on, **run_on)),
            *(
                (programs, name, wrapped(getattr(programs, name), always(TRANSV)))
                for name in ("regroup", "drop", "transfer")
            ),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield parts


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
