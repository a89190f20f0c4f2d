"""Stored features: each video its own, however batched; named by the encoder."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tiny import build
from tests.training import mini
from timeviper_jax import sharding
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.inference.encode import encode_videos, fingerprint, make_encoder
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
