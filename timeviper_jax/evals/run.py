"""A trained model and all that belongs to it, from the directory of its run."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float16, Float64
from tqdm import tqdm

from timeviper_jax import sharding
from timeviper_jax.data import frames
from timeviper_jax.data.conversation import TEMPLATES, Template
from timeviper_jax.data.examples import FrameFeatures
from timeviper_jax.data.features import FeatureStore, second_times
from timeviper_jax.data.media import MediaLimits
from timeviper_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from timeviper_jax.data.video import fps_times, probe
from timeviper_jax.data.workers import Decoder, WorkerConfig, decoder
from timeviper_jax.inference.encode import (
    Encode,
    encode_videos,
    encoding,
    fingerprint,
    make_encoder,
)
from timeviper_jax.inference.merging import Merging
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.training.checkpoint import Checkpoints, load_model

# Of a batch of frames: what changed of one fills smaller batches with less padding.
_PARTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What training left behind, and the features of the videos seen so far.

    `step` is that of its checkpoint. Frames of one video that differ from the last
    encoded one by less than `merge_below` have its features.
    """

    model: TimeViper
    tokenizer: Tokenizer
    template: Template
    features: FeatureStore
    mesh: Mesh
    config: Mapping[str, Any]
    step: int = 0
    merge_below: float = 0.0

    @property
    def limits(self) -> MediaLimits:
        """The most that a medium may be, as in training."""
        # Runs from before there were any have none of their own.
        return MediaLimits(**self.config["data"].get("media", {}))

    @property
    def media(self) -> Decoder:
        """Reads whole videos as training did."""
        workers = WorkerConfig(**self.config["data"].get("workers", {}))
        return decoder(self.limits, workers)

    @property
    def compression(self) -> str:
        """What TransV's stages do in all: "none", "drop" or "transv"."""
        stages = [s for s in self.model.cfg.llm.transv if s.keep < 1]
        if not stages:
            return "none"
        return "transv" if any(stage.transfer for stage in stages) else "drop"

    def encoder(self) -> Encode:
        """Frames to features, in batches of one size; compiled once."""
        return self._encoder

    @functools.cached_property
    def _encoder(self) -> Encode:
        return make_encoder(
            self.model, self.mesh, batch_size=self.config["data"]["encode_batch"]
        )

    def video_encoder(self) -> Encode:
        """For the consecutive frames of one video, repeats merged if they are to be."""
        if not self.merge_below:
            return self.encoder()
        batch_size = max(1, self.config["data"]["encode_batch"] // _PARTS)
        encode = make_encoder(self.model, self.mesh, batch_size=batch_size)
        return Merging(encode, self.merge_below)

    def merging(self, threshold: float) -> "Run":
        """The same run where it merges repeats; their features are kept apart."""
        if threshold and self.model.cfg.vision.clip_frames > 1:
            raise ValueError(
                "This encoder sees clips, which have no frames to merge; skip repeats."
            )
        if not threshold:
            return self
        name = f"{fingerprint(self.model)} merged below {threshold}"
        store = FeatureStore(self.config["data"]["features"], name)
        return dataclasses.replace(self, features=store, merge_below=threshold)


def load(workdir: str | os.PathLike) -> Run:
    """The run's newest whole checkpoint.

    Raises:
      FileNotFoundError: There is none.
    """
    missing = FileNotFoundError(
        f"{workdir} holds no checkpoint; train into it first:"
        f" python train.py --config configs/needles.py --workdir {workdir}"
    )
    if not pathlib.Path(workdir, "checkpoints").is_dir():
        raise missing
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        record = checkpoints.latest()
        if record is None:
            raise missing
        mesh = sharding.make_mesh(**record.config["mesh"])
        model = load_model(checkpoints, mesh)
    data = record.config["data"]
    return Run(
        model=model,
        tokenizer=_tokenizer(data["tokenizer"]),
        template=TEMPLATES[data["template"]],
        features=FeatureStore(data["features"], fingerprint(model)),
        mesh=mesh,
        config=record.config,
        step=record.step,
    )


def digest(model: nnx.Module, *more: object) -> str:
    """Names a model by its sizes and weights, and `more` that it is used with."""
    named = repr((model.cfg, *more)).encode()
    found = hashlib.blake2b(named, digest_size=16)
    for path, param in nnx.to_flat_state(nnx.state(model)):
        found.update("/".join(map(str, path)).encode())
        found.update(np.ascontiguousarray(param[...]).tobytes())
    return found.hexdigest()


def _tokenizer(name: str) -> Tokenizer:
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name)


def encode_missing(run: Run, paths: Iterable[str]) -> None:
    """Encodes the videos whose features the run does not have yet."""
    missing = sorted(path for path in set(paths) if path not in run.features)
    at_once = 8 * run.config["data"]["encode_batch"]
    media = run.media
    times = {path: second_times(media.probe(path).duration) for path in missing}
    for path in [path for path in missing if len(times[path]) > at_once]:
        with encoded(run, path, times.pop(path)) as features:
            for start in range(0, features.shape[0], at_once):
                features[start : start + at_once]
    if times:
        _encode_together(run, list(times), at_once)


def _encode_together(run: Run, paths: list[str], at_once: int) -> None:
    """Encodes videos that are short enough to be held whole."""
    cfg, threads = run.model.cfg, run.config["data"]["num_threads"]
    done = encode_videos(
        frames.decoded_videos(paths, cfg.fit, num_threads=threads, media=run.media),
        run.encoder(),
        run.features,
        at_once=at_once,
        clip_frames=cfg.vision.clip_frames,
    )
    for _ in tqdm(done, total=len(paths), desc="encode", unit="video"):
        pass


def watch_times(path: str | os.PathLike, max_frames: int) -> Float64[np.ndarray, "F"]:
    """One moment a second, or `max_frames` over the whole of a longer video."""
    duration = probe(path).duration
    if round(duration) <= max_frames:
        return second_times(duration)
    return fps_times(duration, 1, max_frames)


class Counted:
    """Features whose frames are counted as they are read."""

    def __init__(self, features: FrameFeatures, count: Callable[[int], object]):
        self.shape = features.shape
        self._features, self._count = features, count

    def __getitem__(self, frames: slice) -> Float16[np.ndarray, "F V E"]:
        read = self._features[frames]
        self._count(len(read))
        return read


@contextlib.contextmanager
def encoded(
    run: Run, path: str | os.PathLike, times: Float64[np.ndarray, "F"]
) -> Iterator[FrameFeatures]:
    """Features of the frames at `times`, to be read in order while they are made.

    They are kept, and found the next time; those that an interrupted run left are not
    made again. Leaving before the last one was read stops the making.
    """
    if kept := run.features.find(path, times):
        with tqdm(total=len(kept), desc="watch", unit="frame", disable=None) as bar:
            yield Counted(kept, bar.update)
        return
    cfg = run.model.cfg
    file = run.features.grow(
        path,
        times,
        tokens=cfg.tokens_per_frame,
        width=cfg.projector.vision_dim,
        clip=cfg.vision.clip_frames,
    )
    batches = frames.frame_batches(
        path,
        times[file.present :],
        cfg.fit,
        size=run.config["data"]["encode_batch"],
        threads=decoding_threads(),
        limits=run.limits,
    )
    bar = tqdm(
        total=len(file), initial=file.present, desc="encode", unit="frame", disable=None
    )
    with (
        bar,
        encoding(
            batches,
            run.video_encoder(),
            file,
            own_thread=run.mesh.size == 1,
            on_frames=bar.update,
        ) as arriving,
    ):
        yield arriving


def decoding_threads() -> int:
    """A quarter of the cores: the rest encode and read what was decoded."""
    return max(1, (os.cpu_count() or 1) // 4)
