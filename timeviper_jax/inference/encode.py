"""Features of whole videos, made once by a frozen encoder and kept.

What is kept of a frame is what `TimeViper.encode` gives: its merged tokens, before the
projector. The encoder is compiled once, for batches of frames of one size, which
frames of several short videos fill together. An encoder of clips sees a video's
consecutive frames together; the last one is repeated until its clip is full.

A long video is never there as a whole: one thread decodes a few batches ahead, another
encodes them into a growing file, and the language model reads that.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float16, UInt8

from timeviper_jax import sharding
from timeviper_jax.data.ahead import Ahead
from timeviper_jax.data.feature_file import GrowingFile
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.timeviper import TimeViper

Frames = UInt8[np.ndarray, "F H W 3"]
Encode = Callable[[Frames], Float16[np.ndarray, "F V E"]]
# Batches that wait for the encoder: one to take, one in the making.
_BATCHES_AHEAD = 2


def fingerprint(model: TimeViper) -> str:
    """Names the encoder by its sizes and weights."""
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} hosts: encode on one, into a folder that all see."
        )
    digest = hashlib.blake2b(digest_size=16)
    cfg = model.cfg
    named = (dataclasses.asdict(cfg.vision), cfg.tokens_per_frame)
    # What these usually are goes unsaid, so that the oldest stores are still found.
    if (cfg.token_order, cfg.resize) != ("raw", "resize-naive"):
        named = (*named, cfg.token_order, cfg.resize)
    digest.update(repr(named).encode())
    for path, param in nnx.to_flat_state(nnx.state(model.vision)):
        digest.update("/".join(map(str, path)).encode())
        digest.update(np.ascontiguousarray(param[...]).tobytes())
    return digest.hexdigest()


def make_encoder(model: TimeViper, mesh: Mesh, *, batch_size: int) -> Encode:
    """Returns frames → features, `batch_size` frames at a time on all devices."""
    graph, params = nnx.split(model)
    clip = model.cfg.vision.clip_frames
    if batch_size % clip:
        raise ValueError(
            f"{batch_size=} is not whole clips of {clip} frames; use a multiple."
        )

    @jax.jit
    def encode(params, frames):
        return nnx.merge(graph, params).encode(frames).astype(jnp.float16)

    def run(frames: Frames) -> Float16[np.ndarray, "F V E"]:
        parts = []
        for start in range(0, len(frames), batch_size):
            some = frames[start : start + batch_size]
            whole = _fill_clips(some, clip)
            missing = batch_size - len(whole)
            padded = np.pad(whole, [(0, missing)] + [(0, 0)] * 3)
            parts.append(encode(params, sharding.put(padded, mesh))[: len(some)])
        return np.concatenate(jax.device_get(parts))

    return run


class Arriving:
    """Features of a video, F V E, some of which a thread is still encoding.

    `arriving[start:stop]` waits for those frames, or raises what stopped them.
    """

    def __init__(self, file: GrowingFile, arrivals: Iterator[int]):
        self.shape = file.shape
        self._file, self._arrivals = file, arrivals

    def __getitem__(self, frames: slice) -> Float16[np.ndarray, "F V E"]:
        _, stop, _ = frames.indices(self.shape[0])
        while self._file.present < stop:
            next(self._arrivals)
        return self._file[frames]


@contextmanager
def encoding(
    batches: Generator[Frames, None, None],
    encode: Encode,
    file: GrowingFile,
    *,
    own_thread: bool = True,
    on_frames: Callable[[int], object] = int,
) -> Iterator[Arriving]:
    """Encodes while the caller reads; leaving ends the threads and closes the file.

    Args:
      batches: The frames that the file lacks, decoded as they are asked for. What
        thins or changes pixels stands between them and the decoder.
      encode: Is given each batch, in order.
      file: Takes the features.
      own_thread: Or in the caller's, when it wants frames: two threads must not start
        programs on several devices at once, which may wait for each other.
      on_frames: Is called with the number of each batch's, where it was encoded.
    """

    def append() -> Generator[int, None, None]:
        with Ahead(batches, most=_BATCHES_AHEAD) as decoded:
            for frames in decoded:
                file.append(encode(frames))
                on_frames(len(frames))
                yield len(frames)
        if file.present < len(file):
            raise ValueError(f"Only {file.present} of {len(file)} frames were given.")

    # Features are on disk as soon as they are made: any number may be ahead.
    run = Ahead(append(), most=len(file)) if own_thread else closing(append())
    with closing(file), run as arrivals:
        yield Arriving(file, arrivals)


def encode_videos(
    videos: Iterable[tuple[str, Frames]],
    encode: Encode,
    store: FeatureStore,
    *,
    at_once: int,
    clip_frames: int = 1,
) -> Iterator[str]:
    """Puts the features of every video into the store; yields the videos as it does.

    Short videos go through the encoder together, at least `at_once` frames a time.
    """
    for group in _groups(videos, at_once):
        filled = [_fill_clips(frames, clip_frames) for _, frames in group]
        features = encode(np.concatenate(filled))
        ends = np.cumsum([len(frames) for frames in filled])
        for (path, frames), own in zip(
            group, np.split(features, ends[:-1]), strict=True
        ):
            store.put(path, own[: len(frames)])
            yield path


def _fill_clips(frames: Frames, clip: int) -> UInt8[np.ndarray, "_ H W 3"]:
    """The last frame again, until its clip is full."""
    return np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % clip, 0)])


def _groups(
    videos: Iterable[tuple[str, Frames]], at_once: int
) -> Iterator[list[tuple[str, Frames]]]:
    """Consecutive videos that have `at_once` frames in all, or are the last."""
    group, size = [], 0
    for path, frames in videos:
        group.append((path, frames))
        size += len(frames)
        if size >= at_once:
            yield group
            group, size = [], 0
    if group:
        yield group
