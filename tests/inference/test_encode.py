"""Stored features: each video its own, however batched; named by the encoder."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import mini
from timeviper_jax import sharding
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.inference.encode import encode_videos, fingerprint, make_encoder
from timeviper_jax.training.parameters import merge

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
