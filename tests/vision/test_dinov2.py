"""DINOv2 with registers: timm's numbers, and what its extra tokens must not change."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden_cases import load, under
from timeviper_jax.conversion.load import load_params
from timeviper_jax.conversion.vision import encoder_rules, encoder_unused
from timeviper_jax.vision.dinov2 import DinoV2, DinoV2Config

CFG = DinoV2Config(
    image_size=70, patch_size=14, embed_dim=64, depth=4, num_heads=4, mlp_dim=256
)


@pytest.fixture(scope="module")
def golden():
    return load("vit_dinov2_reg_tiny")[1]


@pytest.fixture(scope="module")
def encoder(golden):
    encoder = nnx.eval_shape(lambda: DinoV2(CFG, rngs=nnx.Rngs(0)))
    params = under("param.", golden)
    load_params(encoder, params, encoder_rules(CFG), ignore=encoder_unused(CFG))
    return encoder


@pytest.fixture(scope="module")
def features(golden, encoder):
    pixels = golden["in.pixel_values"].transpose(0, 2, 3, 1)
    return nnx.jit(lambda encoder, x: encoder(x))(encoder, jnp.asarray(pixels))


def test_features_are_timms_without_class_and_registers(golden, features):
    # They reach 90, where a float32 is good to 8e-6 and a sum to a few times that.
    np.testing.assert_allclose(features, golden["out.features"], atol=8e-5, rtol=0)


def test_a_position_of_the_class_token_is_added_to_it(golden, encoder, features):
    cfg = dataclasses.replace(CFG, class_position=True)
    other = nnx.eval_shape(lambda: DinoV2(cfg, rngs=nnx.Rngs(0)))
    state = nnx.state(encoder)
    where = jnp.linspace(-1, 1, 64)
    state["class_token"] = nnx.Param(encoder.class_token[...] - where)
    rows = jnp.concatenate([where[None], encoder.positions[...]])
    state["positions"] = nnx.Param(rows)
    nnx.update(other, state)
    pixels = golden["in.pixel_values"].transpose(0, 2, 3, 1)
    got = nnx.jit(lambda encoder, x: encoder(x))(other, jnp.asarray(pixels))
    np.testing.assert_allclose(got, features, atol=8e-5, rtol=0)
