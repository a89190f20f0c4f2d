"""InternVideo2: the release's numbers, for clips of four frames and for images."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden_cases import load, under
from timeviper_jax.conversion.load import load_params
from timeviper_jax.conversion.vision import encoder_rules, encoder_unused
from timeviper_jax.vision.encoder import encode
from timeviper_jax.vision.internvideo2 import (
    InternVideo2,
    InternVideo2Config,
    space_time_waves,
)

CFG = InternVideo2Config(
    image_size=56, patch_size=14, embed_dim=64, depth=4, num_heads=4, mlp_dim=279
)
V = CFG.num_tokens

# Features reach 110, where a float32 is good to 8e-6 and a sum to a few times that.
RECORDED = dict(atol=8e-5, rtol=0)


@pytest.fixture(scope="module")
def golden():
    return load("vit_internvideo2_tiny")[1]


@pytest.fixture(scope="module")
def encoder(golden):
    encoder = nnx.eval_shape(lambda: InternVideo2(CFG, rngs=nnx.Rngs(0)))
    params = under("param.", golden)
    load_params(encoder, params, encoder_rules(CFG), ignore=encoder_unused(CFG))
    return encoder


@nnx.jit
def run(encoder, clips):
    return encoder(clips)


def test_a_clip_is_the_releases(golden, encoder):
    clip = golden["in.video4"].transpose(1, 0, 3, 4, 2)
    got = run(encoder, jnp.asarray(clip))
    np.testing.assert_allclose(got, golden["out.video4"], **RECORDED)


def test_images_are_the_releases(golden, encoder):
    images = golden["in.images"].transpose(0, 1, 3, 4, 2)
    want = golden["out.images"]
    np.testing.assert_allclose(run(encoder, jnp.asarray(images)), want, **RECORDED)
    one_a_row = nnx.jit(encode, static_argnums=2)(encoder, jnp.asarray(images), V)
    np.testing.assert_allclose(one_a_row[:, 0], want, **RECORDED)


def test_a_video_is_cut_into_clips_that_do_not_affect_each_other(golden, encoder):
    clip = golden["in.video4"].transpose(1, 0, 3, 4, 2)
    video = jnp.concatenate([jnp.zeros_like(clip), clip], axis=1)
    both = nnx.jit(encode, static_argnums=2)(encoder, video, V)
    assert both.shape == (1, 8, V, 64)
    want = golden["out.video4"].reshape(4, V, 64)
    np.testing.assert_allclose(both[0, 4:], want, **RECORDED)


def test_a_clips_tokens_merge_together_and_are_shared_out(encoder, golden):
    clip = jnp.asarray(golden["in.video4"].transpose(1, 0, 3, 4, 2))
    # All but one token come from the same few, if the frames are the same.
    merged = nnx.jit(encode, static_argnums=2)(encoder, clip, 2)
    assert merged.shape == (1, 4, 2, 64)
    # A mean, weighted by sizes, of what was merged: no clip's token is lost.
    whole = run(encoder, clip)
    assert float(merged.min()) >= float(whole.min())
    assert float(merged.max()) <= float(whole.max())


def test_positions_start_as_the_releases_waves(golden):
    for frames, name in ((4, "pos_embed"), (1, "img_pos_embed")):
        want = golden[f"out.init_sincos.{name}"][0]
        got = space_time_waves(frames, 4, 64)
        np.testing.assert_allclose(got, want[1:], atol=1e-6)
        np.testing.assert_array_equal(want[0], np.zeros(64))


def test_what_is_neither_clip_nor_image_says_why(encoder):
    with pytest.raises(ValueError, match="3 frames are neither a clip of 4 nor an"):
        encoder(jnp.zeros((1, 3, 56, 56, 3)))
    with pytest.raises(ValueError, match="6 frames do not divide into clips of 4"):
        encode(encoder, jnp.zeros((1, 6, 56, 56, 3)), 16)
    with pytest.raises(ValueError, match="dim=24 does not hold waves"):
        space_time_waves(4, 4, 24)
