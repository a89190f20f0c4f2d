"""Frames without questions: labelled ones that warm up an encoder, whole videos.

Both come from records of consecutive frames of one file (`needle_builder`), which are
decoded once; whole videos also straight from their files.
"""

import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Float64, Int, UInt8

from timeviper_jax.data.features import second_times
from timeviper_jax.data.images import Fit, as_fit
from timeviper_jax.data.iterator import NamedBatches
from timeviper_jax.data.lanes import Lanes
from timeviper_jax.data.lanes import share as share_lanes
from timeviper_jax.data.media import MediaLimits, VideoError
from timeviper_jax.data.video import LIMITS, iter_frames
from timeviper_jax.data.workers import Decoder

Record = dict[str, Any]


class FrameBatch(NamedTuple):
    """Single frames and what each shows."""

    frames: UInt8[np.ndarray, "B H W 3"]
    labels: Int[np.ndarray, "B"]


def make_frame_batches(
    records: Sequence[Record],
    *,
    batch_size: int,
    per_record: int,
    share: float,
    seed: int,
    lanes: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> NamedBatches[FrameBatch]:
    """Batches without end of frames, some of which show something (label above 0).

    They are varied as a camera would: brightness, contrast, and where nothing is
    shown also side and colours.

    Args:
      records: Random access to {"frames", "labels", "file", "start"}.
      batch_size: Frames, over all hosts.
      per_record: Frames that are drawn from a record each time it is read.
      share: Of the frames of a record with both, those that show something.
      seed: Decides the order and the draws.
      lanes: What hosts can share, evenly (`timeviper_jax.data.lanes`).
      process_index: This host's number.
      process_count: How many hosts share the batches.
    """
    each, over = divmod(batch_size, per_record * lanes)
    if over:
        raise ValueError(
            f"batch_size={batch_size} does not divide among {lanes} lanes with"
            f" {per_record} frames a record; use a multiple."
        )
    mine, _ = share_lanes(
        lanes, batch_size, process_index=process_index, process_count=process_count
    )
    draws = grain.MapDataset.source(records).seed(seed).shuffle().repeat()
    draws = draws.random_map(lambda record, rng: _draw(record, per_record, share, rng))
    options = grain.ReadOptions(
        num_threads=-(-2 // len(mine)), prefetch_buffer_size=-(-32 // len(mine))
    )
    streams = {n: draws[n::lanes].to_iter_dataset(options) for n in mine}
    return NamedBatches(iter(Lanes(streams, each).map(_join)))


class _Drawn(NamedTuple):
    name: str  # Of the record: its file, and the second it begins at.
    frames: FrameBatch


def _draw(record: Record, count: int, share: float, rng: np.random.Generator) -> _Drawn:
    """`count` frames of a record, a share of which show something."""
    labels = np.asarray(record["labels"])
    something, nothing = np.flatnonzero(labels > 0), np.flatnonzero(labels == 0)
    halves = [half for half in (something, nothing) if len(half)]
    shown = max(1, round(count * share))
    sizes = [shown, count - shown] if len(halves) == 2 else [count]
    chosen = np.concatenate(
        [rng.choice(half, size) for half, size in zip(halves, sizes, strict=True)]
    )
    frames = np.asarray(record["frames"])[chosen]
    batch = FrameBatch(
        frames=_vary(frames, labels[chosen] == 0, rng),
        labels=labels[chosen].astype(np.int32),
    )
    return _Drawn(f"{os.fsdecode(record['file'])}@{record['start']}", batch)


def _vary(
    frames: UInt8[np.ndarray, "B H W 3"],
    empty: Bool[np.ndarray, "B"],
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "B H W 3"]:
    """Frames in another light; empty ones may be mirrored and change colours."""
    frames = frames.astype(np.float32)
    for i in np.flatnonzero(empty & (rng.random(len(empty)) < 0.3)):
        frames[i] = frames[i][..., rng.permutation(3)]
    mirrored = empty & (rng.random(len(empty)) < 0.5)
    frames[mirrored] = frames[mirrored, :, ::-1]
    contrast = rng.uniform(0.8, 1.25, (len(frames), 1, 1, 1))
    brightness = rng.uniform(-20, 20, (len(frames), 1, 1, 1))
    mean = frames.mean(axis=(1, 2, 3), keepdims=True)
    frames = (frames - mean) * contrast + mean + brightness
    return np.clip(frames, 0, 255).astype(np.uint8)


def _join(parts: Sequence[_Drawn]) -> tuple[FrameBatch, tuple[str, ...]]:
    batch = FrameBatch(
        frames=np.concatenate([part.frames.frames for part in parts]),
        labels=np.concatenate([part.frames.labels for part in parts]),
    )
    return batch, tuple(part.name for part in parts)


def recorded_videos(
    records: Iterable[Record],
) -> Iterator[tuple[str, UInt8[np.ndarray, "F H W 3"]]]:
    """Each file with all its frames, from records in the order of the files."""
    for file, mine in itertools.groupby(records, key=lambda record: record["file"]):
        frames = np.concatenate([record["frames"] for record in mine])
        yield os.fsdecode(file), frames  # TFDS gives text as bytes.


def decoded_videos(
    paths: Sequence[str],
    fit: Fit | int,
    *,
    num_threads: int,
    media: Decoder,
    on_error: Callable[[str, VideoError], object] | None = None,
) -> Iterator[tuple[str, UInt8[np.ndarray, "F H W 3"]]]:
    """Each file with the frames of all its seconds; a few are decoded ahead.

    `on_error` is told of each file that cannot be read, which is then left out; without
    one, the first ends all.
    """

    def decode(path: str) -> tuple[str, UInt8[np.ndarray, "F H W 3"] | VideoError]:
        try:
            times = second_times(media.probe(path).duration)
            return path, media.read_frames(path, times, fit)
        except VideoError as error:
            return path, error

    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=2 * num_threads
    )
    made = grain.MapDataset.source(paths).map(decode).to_iter_dataset(options)
    for path, found in made:
        if not isinstance(found, VideoError):
            yield path, found
        elif on_error is None:
            raise found
        else:
            on_error(path, found)


def frame_batches(
    path: str | os.PathLike,
    times: Float64[np.ndarray, "F"],
    fit: Fit | int,
    *,
    size: int,
    threads: int = 1,
    limits: MediaLimits = LIMITS,
) -> Generator[UInt8[np.ndarray, "_ H W 3"], None, None]:
    """The frames at `times`, `size` together and what is left; one batch is held."""
    fit = as_fit(fit)
    frames = iter_frames(path, times, fit, threads=threads, limits=limits)
    for start in range(0, len(times), size):
        count = min(size, len(times) - start)
        # Written where they stay: small arrays left between a decoder's large ones
        # keep the system from having those back, a hundred MiB of them.
        batch = np.empty((count, fit.size, fit.size, 3), np.uint8)
        for i, frame in enumerate(itertools.islice(frames, count)):
            batch[i] = frame
        yield batch
