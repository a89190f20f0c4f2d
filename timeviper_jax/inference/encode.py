"""Features of whole videos, made once by a frozen encoder and kept.

What is kept of a frame is what `TimeViper.encode` gives: its merged tokens, before the
projector. The encoder is compiled once, for batches of frames of one size, which
frames of several short videos fill together.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float16, UInt8

from timeviper_jax import sharding
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.timeviper import TimeViper

Frames = UInt8[np.ndarray, "F H W 3"]
Encode = Callable[[Frames], Float16[np.ndarray, "F V E"]]


def fingerprint(model: TimeViper) -> str:
    """Names the encoder by its sizes and weights."""
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} hosts: encode on one, into a folder that all see."
        )
    digest = hashlib.blake2b(digest_size=16)
    sizes = dataclasses.asdict(model.cfg.vision)
    digest.update(repr((sizes, model.cfg.tokens_per_frame)).encode())
    for path, param in nnx.to_flat_state(nnx.state(model.vision)):
        digest.update("/".join(map(str, path)).encode())
        digest.update(np.ascontiguousarray(param[...]).tobytes())
    return digest.hexdigest()


def make_encoder(model: TimeViper, mesh: Mesh, *, batch_size: int) -> Encode:
    """Returns frames → features, `batch_size` frames at a time on all devices."""
    graph, params = nnx.split(model)

    @jax.jit
    def encode(params, frames):
        return nnx.merge(graph, params).encode(frames).astype(jnp.float16)

    def run(frames: Frames) -> Float16[np.ndarray, "F V E"]:
        parts = []
        for start in range(0, len(frames), batch_size):
            some = frames[start : start + batch_size]
            missing = batch_size - len(some)
            padded = np.pad(some, [(0, missing)] + [(0, 0)] * 3)
            parts.append(encode(params, sharding.put(padded, mesh))[: len(some)])
        return np.concatenate(jax.device_get(parts))

    return run


def encode_videos(
    videos: Iterable[tuple[str, Frames]],
    encode: Encode,
    store: FeatureStore,
    *,
    at_once: int,
) -> Iterator[str]:
    """Puts the features of every video into the store; yields the videos as it does.

    Short videos go through the encoder together, at least `at_once` frames a time.
    """
    for group in _groups(videos, at_once):
        features = encode(np.concatenate([frames for _, frames in group]))
        ends = np.cumsum([len(frames) for _, frames in group])
        for (path, _), own in zip(group, np.split(features, ends[:-1]), strict=True):
            store.put(path, own)
            yield path


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
