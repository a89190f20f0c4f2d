"""The needle frames as a tensorflow-datasets builder, without TensorFlow.

Each video is decoded once, to small frames with a label a frame: what is shown, if
anything. The encoder is warmed up on them, and features are computed from them.

builder = needle_builder.prepare("data/needles", "train")
source = builder.as_data_source("train")  # Random access; goes into grain.
"""

import collections
import concurrent.futures
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int64, UInt8

from timeviper_jax.data import needle_sources as sources
from timeviper_jax.data import needles, video

SIZE = 32
CHUNK = 256  # Frames in a record; a file's last may have fewer.
LABELS = ("nothing", *sources.NAMES)


class Needles(tfds.core.GeneratorBasedBuilder):
    """Records of consecutive frames of one file, in the order of the manifest."""

    VERSION = tfds.core.Version("1.0.0")
    # A split is a config, so that nobody waits for one that is not asked for.
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=split) for split in needles.SPLITS]
    # Nothing is downloaded; looking for checksums needs a package TFDS doesn't install.
    url_infos = None
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Make the data with `python -m timeviper_jax.data.needles --out DIR` and give "
        "DIR as the manual directory."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        tensor = tfds.features.Tensor
        features = {
            # As bytes: a list of integers takes two hundred times as long to write.
            "frames": tensor(
                shape=(None, SIZE, SIZE, 3), dtype=np.uint8, encoding="bytes"
            ),
            "labels": tensor(shape=(None,), dtype=np.int64),  # Indices of LABELS.
            "times": tensor(shape=(None,), dtype=np.float32),
            "file": tfds.features.Text(),
            "start": tfds.features.Scalar(dtype=np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Frames of the needle videos, with what each of them shows.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        root = pathlib.Path(dl_manager.manual_dir)
        split = self.builder_config.name
        return {split: self._generate_examples(root, split)}

    def _generate_examples(
        self, root: pathlib.Path, split: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        scenes = collections.defaultdict(list)
        for scene in needles.read_lines(root / f"{split}.scenes.jsonl"):
            scenes[scene["image"]].append(scene)
        key = 0
        for file, frames in _decode(root, scenes):
            labels = label_frames(scenes[file])
            for record in _records(file, frames, labels):
                yield key, record
                key += 1


def prepare(
    source: str | pathlib.Path,
    split: str,
    data_dir: str | pathlib.Path | None = None,
) -> Needles:
    """The builder of a split of `source`, its records written if they are not yet."""
    data_dir = pathlib.Path(data_dir or pathlib.Path(source) / "tfds")
    for left in data_dir.glob(f"{Needles.name}/{split}/incomplete.*"):
        shutil.rmtree(left)  # By a run that was stopped.
    builder = Needles(config=split, data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(source))
    )
    return builder


def label_frames(scenes: list[dict[str, Any]]) -> Int64[np.ndarray, "F"]:
    """What each second of a file shows, from all of its scenes."""
    labels = np.zeros(scenes[-1]["video_end"], np.int64)
    for scene in scenes:
        for name, start, stop in scene["objects"]:
            labels[start:stop] = LABELS.index(name)
    return labels


def _records(
    file: str, frames: UInt8[np.ndarray, "F S S 3"], labels: Int64[np.ndarray, "F"]
) -> Iterator[dict[str, Any]]:
    times = np.arange(len(frames), dtype=np.float32) + 0.5
    for start in range(0, len(frames), CHUNK):
        now = slice(start, start + CHUNK)
        yield {
            "frames": frames[now],
            "labels": labels[now],
            "times": times[now],
            "file": file,
            "start": start,
        }


def _decode(
    root: pathlib.Path, scenes: dict[str, list[dict[str, Any]]]
) -> Iterator[tuple[str, UInt8[np.ndarray, "F S S 3"]]]:
    """All files in order, a frame a second; a few are decoded ahead in threads."""
    workers = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending = collections.deque()
        for file, mine in scenes.items():
            times = np.arange(mine[-1]["video_end"]) + 0.5
            frames = pool.submit(video.read_frames, root / file, times, SIZE)
            pending.append((file, frames))
            if len(pending) > 2 * workers:
                file, frames = pending.popleft()
                yield file, frames.result()
        for file, frames in pending:
            yield file, frames.result()
