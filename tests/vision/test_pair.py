"""Two encoders: the release's order of tokens; features that know whose they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from tests.golden_cases import load, under
from timeviper_jax.conversion.load import load_params
from timeviper_jax.conversion.vision import pair_projector_rules
from timeviper_jax.data.examples import Batch, Role
from timeviper_jax.presets import PRESETS, with_encoder
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.vision.dinov2 import DinoV2Config
from timeviper_jax.vision.internvideo2 import InternVideo2Config
from timeviper_jax.vision.pair import (
    PairConfig,
    PairProjector,
    PairProjectorConfig,
    side_by_side,
)
from timeviper_jax.vision.projector import ProjectorConfig
from timeviper_jax.vision.tome import merge

_merge = jax.jit(merge, static_argnums=1)


@functools.cache
def recorded():
    """The arrays, and the two projectors they were recorded with, by form."""
    arrays = load("projector_multi")[1]
    widths = {"first": 32, "second": 48}
    cfg = PairProjectorConfig(
        **{k: ProjectorConfig(vision_dim=E, llm_dim=40) for k, E in widths.items()}
    )
    projectors = {}
    for form in ("mlp", "tome"):
        projector = nnx.eval_shape(lambda: PairProjector(cfg, rngs=nnx.Rngs(0)))
        params = under(f"param.{form}.", arrays)
        load_params(projector, params, pair_projector_rules(["a", "b"]))
        projectors[form] = projector
    return arrays, projectors


@pytest.mark.parametrize(
    ("form", "output", "prepare"),
    [
        ("mlp", "mlp_seqcat", lambda x: x),
        ("mlp", "mlp_interleave_49", lambda x: x[:, :49]),
        ("tome", "tome", lambda x: _merge(x, 8)[0]),
    ],
)
def test_release_orders_and_projects_alike(form, output, prepare):
    arrays, projectors = recorded()
    a, b = (prepare(jnp.asarray(arrays[f"in.{name}"])) for name in "ab")
    got = projectors[form](side_by_side(a, b))
    np.testing.assert_allclose(got, arrays[f"out.{output}"], atol=2e-6)


IMAGES = DinoV2Config(
    image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_dim=64
)
CLIPS = InternVideo2Config(
    image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, mlp_dim=64
)


@pytest.fixture(scope="module")
def model():
    cfg = PRESETS["tiny"]
    cfg = with_encoder(cfg, PairConfig(first=IMAGES, second=CLIPS), "tome_mlp-3")
    return tiny.build(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def encoded(model):
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), np.uint8)
    return frames, nnx.jit(lambda m, x: m.encode(x))(model, jnp.asarray(frames))


def test_features_of_two_encoders_lie_side_by_side(model, encoded):
    frames, features = encoded
    assert features.shape == (2, 4, 6, 49)
    np.testing.assert_array_equal(features[0, 0, :, -1], [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(features[..., ::2, 32:48], np.zeros((2, 4, 3, 16)))
    alone = nnx.jit(lambda m, x: m(x))(model.vision.first, jnp.asarray(frames[0]))
    np.testing.assert_allclose(
        features[0, :, ::2, :32], _merge(alone, 3)[0], atol=1e-5, rtol=1e-5
    )


def test_a_token_projects_alone_as_in_its_frame(model, encoded):
    _, features = encoded
    times = jnp.zeros((2, 4))
    whole = model.project(features, times)
    tokens = features.reshape(2, 24, 1, 49)
    alone = model.project(tokens, jnp.zeros((2, 24)))
    np.testing.assert_allclose(alone.reshape(whole.shape), whole, atol=1e-6)
    kept = features.astype(jnp.float16)  # As features are stored.
    np.testing.assert_allclose(model.project(kept, times), whole, atol=2e-2)


def test_stored_features_take_the_place_of_clips(model, encoded):
    frames, features = encoded
    roles = np.full((2, 30), Role.INSTRUCTION, np.int32)
    roles[:, 2:26] = Role.VISION
    batch = Batch(
        tokens=np.ones((2, 30), np.int32),
        roles=roles,
        segment_ids=np.ones((2, 30), np.int32),
        loss_mask=np.zeros((2, 30), bool),
        frames=jnp.asarray(frames),
        frame_times=np.zeros((2, 4), np.float32),
    )
    embed = tiny.quick_jit(lambda model, batch: model.embed(batch).x)
    want = embed(model, batch)
    stored = dataclasses.replace(batch, frames=None, features=features)
    np.testing.assert_allclose(embed(model, stored), want, atol=1e-5, rtol=1e-5)


def test_gradients_reach_both_projectors(model, encoded):
    graph, params = nnx.split(model.projector)
    loss = lambda params: jnp.sum(nnx.merge(graph, params)(encoded[1]) ** 2)
    for path, grad in nnx.to_flat_state(jax.grad(loss)(params)):
        assert np.isfinite(grad[...]).all() and jnp.abs(grad[...]).max() > 0, path


def test_two_encoders_letterbox_alike_or_not_at_all():
    grey = dataclasses.replace(IMAGES, mean=(0.5, 0.5, 0.5))
    pair = PairConfig(first=grey, second=CLIPS)
    cfg = with_encoder(PRESETS["tiny"], pair, "tome_mlp-3")
    with pytest.raises(ValueError, match=r"with \(127, 127, 127\) and \(123, 116, 103"):
        dataclasses.replace(cfg, resize="letterbox")
    pair = PairConfig(first=IMAGES, second=CLIPS)
    cfg = with_encoder(PRESETS["tiny"], pair, "tome_mlp-3")
    assert dataclasses.replace(cfg, resize="letterbox").fit.fill == (123, 116, 103)


def test_a_pair_that_does_not_fit_says_why():
    pair = PairConfig(first=IMAGES, second=CLIPS)
    assert pair.shares(32) == (16, 16) and pair.shares(6) == (3, 3)
    uneven = PairConfig(first=dataclasses.replace(IMAGES, patch_size=16), second=CLIPS)
    assert uneven.shares(20) == (4, 16)
    with pytest.raises(ValueError, match="7 tokens a frame do not halve"):
        pair.shares(7)
    with pytest.raises(ValueError, match=r"frames of \(32, 64\) pixels"):
        PairConfig(first=IMAGES, second=dataclasses.replace(CLIPS, image_size=64))
    with pytest.raises(ValueError, match="lead to widths 8 and 16"):
        PairProjectorConfig(
            first=ProjectorConfig(vision_dim=4, llm_dim=8),
            second=ProjectorConfig(vision_dim=4, llm_dim=16),
        )
