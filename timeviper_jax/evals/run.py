"""A trained model and all that belongs to it, from the directory of its run."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float16, Float64
from tqdm import tqdm

from timeviper_jax import sharding
from timeviper_jax.data import frames
from timeviper_jax.data.conversation import TEMPLATES, Template
from timeviper_jax.data.features import FeatureStore, second_times
from timeviper_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from timeviper_jax.data.video import fps_times, iter_frames, probe
from timeviper_jax.inference.encode import (
    Encode,
    encode_videos,
    fingerprint,
    make_encoder,
)
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.training.checkpoint import Checkpoints, load_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What training left behind, and the features of the videos seen so far."""

    model: TimeViper
    tokenizer: Tokenizer
    template: Template
    features: FeatureStore
    mesh: Mesh
    config: Mapping[str, Any]

    @property
    def compression(self) -> str:
        """What TransV's stages do in all: "none", "drop" or "transv"."""
        stages = [s for s in self.model.cfg.llm.transv if s.keep < 1]
        if not stages:
            return "none"
        return "transv" if any(stage.transfer for stage in stages) else "drop"

    def encoder(self) -> Encode:
        return make_encoder(
            self.model, self.mesh, batch_size=self.config["data"]["encode_batch"]
        )


def load(workdir: str | os.PathLike) -> Run:
    """The run's latest checkpoint; without one it raises `FileNotFoundError`."""
    # Looked for here, because opening a missing run would create it.
    if not any(pathlib.Path(workdir).glob("checkpoints/*/params")):
        raise FileNotFoundError(
            f"{workdir} holds no checkpoint; train into it first:"
            f" python train.py --config configs/needles.py --workdir {workdir}"
        )
    config = _config(workdir)
    mesh = sharding.make_mesh(**config["mesh"])
    model = load_model(workdir, mesh)
    data = config["data"]
    return Run(
        model=model,
        tokenizer=_tokenizer(data["tokenizer"]),
        template=TEMPLATES[data["template"]],
        features=FeatureStore(data["features"], fingerprint(model)),
        mesh=mesh,
        config=config,
    )


def _config(workdir: str | os.PathLike) -> Mapping[str, Any]:
    checkpoints = Checkpoints(workdir)
    record = checkpoints.latest()
    checkpoints.close()
    return record.config


def _tokenizer(name: str) -> Tokenizer:
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name)


def encode_missing(run: Run, paths: Iterable[str]) -> None:
    """Encodes the videos whose features the run does not have yet."""
    missing = sorted(path for path in set(paths) if path not in run.features)
    if not missing:
        return
    cfg, threads = run.model.cfg, run.config["data"]["num_threads"]
    videos = frames.decoded_videos(missing, cfg.fit, num_threads=threads)
    at_once = 8 * run.config["data"]["encode_batch"]
    done = encode_videos(
        videos,
        run.encoder(),
        run.features,
        at_once=at_once,
        clip_frames=cfg.vision.clip_frames,
    )
    for _ in tqdm(done, total=len(missing), desc="encode", unit="video"):
        pass


def watch_times(path: str | os.PathLike, max_frames: int) -> Float64[np.ndarray, "F"]:
    """One moment a second, or `max_frames` over the whole of a longer video."""
    duration = probe(path).duration
    if round(duration) <= max_frames:
        return second_times(duration)
    return fps_times(duration, 1, max_frames)


def encode_file(
    run: Run, path: str | os.PathLike, times: Float64[np.ndarray, "F"]
) -> Float16[np.ndarray, "F V E"]:
    """Features of the frames at `times`, in batches: no more is ever held at once.

    Those of a file's seconds are kept in the store.
    """
    if path in run.features:
        return run.features.at(path, times)
    fit, batch = run.model.cfg.fit, run.config["data"]["encode_batch"]
    encode, pixels, features = run.encoder(), iter_frames(path, times, fit), []
    with tqdm(total=len(times), desc="encode", unit="frame", disable=None) as bar:
        while some := list(itertools.islice(pixels, batch)):
            features.append(encode(np.stack(some)))
            bar.update(len(some))
    features = np.concatenate(features)
    if np.array_equal(times, second_times(probe(path).duration)):
        run.features.put(path, features)
    return features
