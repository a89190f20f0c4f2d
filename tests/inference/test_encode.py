"""Stored features: each video its own, however batched; named by the encoder."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.inference import eight_devices
from tests.tiny import build
from tests.training import mini
from timeviper_jax import sharding
from timeviper_jax.data.feature_file import GrowingFile
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.video import VideoError
from timeviper_jax.inference.encode import (
    encode_videos,
    encoding,
    fingerprint,
    make_encoder,
)
from timeviper_jax.presets import with_encoder
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.training.parameters import merge
from timeviper_jax.vision.internvideo2 import InternVideo2Config

LENGTHS = (3, 10, 1, 6)


@pytest.fixture(scope="module")
def model():
    return mini.make_model()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Files (their content names them) and their frames."""
    folder = tmp_path_factory.mktemp("videos")
    rng, size, made = np.random.default_rng(0), mini.CONFIG.vision.image_size, {}
    for i, length in enumerate(LENGTHS):
        path = folder / f"{i}.mp4"
        path.write_text(str(i))
        frames = rng.integers(0, 256, (length, size, size, 3)).astype(np.uint8)
        made[str(path)] = frames
    return made


def test_every_video_gets_its_own_features(model, videos, tmp_path):
    whole = merge(*model)
    encode = make_encoder(whole, sharding.make_mesh(fsdp=-1), batch_size=4)
    store = FeatureStore(tmp_path, fingerprint(whole))
    done = list(encode_videos(videos.items(), encode, store, at_once=5))
    assert done == list(videos)
    for path, frames in videos.items():
        got = store.get(path)
        assert (len(got), got.dtype) == (len(frames), np.float16)
        want = whole.encode(jnp.asarray(frames))
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)  # float16


def test_a_fingerprint_follows_the_encoders_weights_alone(model):
    graph, params = model
    mark = fingerprint(merge(graph, params))
    other_head = {**params, "llm/head/kernel": params["llm/head/kernel"] + 1}
    assert fingerprint(merge(graph, other_head)) == mark
    other_bias = {**params, "vision/patch/bias": params["vision/patch/bias"] + 1e-6}
    assert fingerprint(merge(graph, other_bias)) != mark


def test_what_features_depend_on_is_in_the_fingerprint(model):
    whole = merge(*model)
    marks = [fingerprint(whole)]
    # The names under which the oldest stores have their features.
    sizes = dataclasses.asdict(whole.cfg.vision)
    assert (
        list(sizes)
        == (
            "image_size patch_size embed_dim depth num_heads mlp_dim norm_eps mean std"
            " unroll remat dtype param_dtype"
        ).split()
    )
    for changes in (dict(token_order="descending"), dict(resize="letterbox")):
        whole.cfg = dataclasses.replace(mini.CONFIG, **changes)
        marks.append(fingerprint(whole))
    assert len(set(marks)) == 3


def test_clips_are_of_one_video_and_the_last_frame_fills_them(videos, tmp_path):
    clips = InternVideo2Config(
        image_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_dim=32
    )
    cfg = with_encoder(mini.CONFIG, clips, "tome_mlp-2")
    model = build(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    mesh = sharding.make_mesh(fsdp=-1)
    with pytest.raises(ValueError, match="batch_size=6 is not whole clips of 4"):
        make_encoder(model, mesh, batch_size=6)
    encode = make_encoder(model, mesh, batch_size=8)
    store = FeatureStore(tmp_path, fingerprint(model))
    assert list(
        encode_videos(videos.items(), encode, store, at_once=9, clip_frames=4)
    ) == list(videos)
    one_clip = nnx.jit(lambda model, frames: model.encode(frames))
    for path, frames in videos.items():
        got = store.get(path)
        assert got.shape == (len(frames), 2, 32)
        last = (len(frames) - 1) // 4 * 4  # Where the last clip begins.
        clip = frames[np.minimum(np.arange(last, last + 4), len(frames) - 1)]
        want = one_clip(model, jnp.asarray(clip))[: len(frames) - last]
        np.testing.assert_allclose(got[last:], want, rtol=2e-3, atol=2e-3)


def fake(frames: np.ndarray) -> np.ndarray:
    """Features that say which frame they are of."""
    return np.repeat(frames[:, :1, :1, 0], 3, axis=2).astype(np.float16)


def fake_batches(numbers, error=None):
    for some in numbers:
        yield np.broadcast_to(
            np.array(some, np.uint8)[:, None, None, None], (len(some), 2, 2, 3)
        )
    if error:
        raise error


@pytest.mark.parametrize("own_thread", [True, False])
def test_features_are_read_while_they_are_made(tmp_path, own_thread):
    file, told = GrowingFile(tmp_path / "f.npy", (9, 1, 3)), []
    batches = fake_batches([range(4), range(4, 8), [8]])
    with encoding(
        batches, fake, file, own_thread=own_thread, on_frames=told.append
    ) as features:
        assert features.shape == (9, 1, 3)
        parts = [features[start : start + 2] for start in range(0, 9, 2)]
    np.testing.assert_array_equal(np.concatenate(parts)[:, 0, 0], range(9))
    assert told == [4, 4, 1]
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy")[:, 0, 1], range(9))


@pytest.mark.parametrize("own_thread", [True, False])
def test_an_error_of_the_decoder_reaches_the_reader_and_what_is_made_is_kept(
    tmp_path, own_thread
):
    place = tmp_path / "f.npy"
    batches = fake_batches([range(4)], VideoError("v.mp4: cut short"))
    with (
        pytest.raises(VideoError, match="cut short"),
        encoding(
            batches, fake, GrowingFile(place, (9, 1, 3)), own_thread=own_thread
        ) as features,
    ):
        for start in range(9):
            features[start : start + 1]
    assert not place.exists()
    again = GrowingFile(place, (9, 1, 3))
    assert again.present in (0, 4)  # The decoder may fail before anything is encoded.
    left = fake_batches([range(again.present, 9)])
    with encoding(left, fake, again) as features:
        np.testing.assert_array_equal(features[:9][:, 0, 0], range(9))


def test_a_reader_that_leaves_ends_the_making(tmp_path):
    made = []

    def endless():
        for number in range(200):
            made.append(number)
            yield np.full((1, 2, 2, 3), number, np.uint8)

    def slow(frames):
        time.sleep(0.005)
        return fake(frames)

    file, before = (
        GrowingFile(tmp_path / "f.npy", (200, 1, 3)),
        threading.active_count(),
    )
    with encoding(endless(), slow, file) as features:
        features[:3]
    assert 3 <= len(made) < 100
    assert threading.active_count() == before
    assert GrowingFile(tmp_path / "f.npy", (200, 1, 3)).present >= 3


def test_fewer_frames_than_promised_are_an_error(tmp_path):
    file = GrowingFile(tmp_path / "f.npy", (9, 1, 3))
    with (
        pytest.raises(ValueError, match="Only 4 of 9 frames were given"),
        encoding(fake_batches([range(4)]), fake, file) as features,
    ):
        features[:9]


@pytest.mark.slow
def test_all_devices_encode_a_batch_together(model):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.inference.eight_devices"],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shards"] == [8 * [2], 8 * [2]]
    want = merge(*model).encode(jnp.asarray(eight_devices.frames(21)))
    np.testing.assert_allclose(found["features"], want, rtol=2e-3, atol=2e-3)  # float16
