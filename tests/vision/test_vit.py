"""The encoder: timm's numbers, from pixels to the second-to-last block."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden_cases import load, under
from timeviper_jax.conversion.load import load_params
from timeviper_jax.conversion.vision import encoder_rules, encoder_unused
from timeviper_jax.vision.blocks import BlockConfig
from timeviper_jax.vision.vit import Vit, VitConfig

# Features reach 70, where a float32 is good to 8e-6 and a sum to a few times that.
close = partial(np.testing.assert_allclose, atol=8e-5, rtol=0)

# The release's tiny so400m; 90 pixels hold six patches of 14 and leave 6 over.
CFG = VitConfig(
    image_size=90, patch_size=14, embed_dim=64, depth=4, num_heads=4, mlp_dim=239
)


@pytest.fixture(scope="module")
def golden():
    return load("vit_siglip_so400m_tiny")[1]


@pytest.fixture(scope="module")
def vit(golden):
    return _loaded(CFG, under("param.", golden))


@pytest.fixture(scope="module")
def pixels(golden):
    return jnp.asarray(golden["in.pixel_values"].transpose(0, 2, 3, 1))


def _abstract(cfg):
    """An encoder of shapes only: fast to build, to be filled."""
    return nnx.eval_shape(lambda: Vit(cfg, rngs=nnx.Rngs(0)))


def _loaded(cfg, params):
    vit = _abstract(cfg)
    load_params(vit, params, encoder_rules(cfg), ignore=encoder_unused(cfg))
    return vit


def _with(vit, **changes):
    """The same parameters, run another way."""
    other = _abstract(dataclasses.replace(vit.cfg, **changes))
    nnx.update(other, nnx.state(vit))
    return other


@nnx.jit
def encode(vit, frames):
    return vit(frames)


def test_features_are_those_of_the_second_to_last_block(golden, vit, pixels):
    got = encode(vit, pixels)
    close(got, golden["out.features"])
    np.testing.assert_array_equal(golden["out.features"], golden["out.block.2"])


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_every_block_agrees_with_timm(golden, pixels, depth):
    params = under("param.", golden)
    later = [f"blocks.{i}." for i in range(depth - 1, 4)]
    kept = {k: p for k, p in params.items() if not k.startswith(tuple(later))}
    vit = _loaded(dataclasses.replace(CFG, depth=depth), kept)
    close(encode(vit, pixels), golden[f"out.block.{depth - 2}"])


def test_scanning_unrolling_and_recomputing_agree(vit, pixels):
    def run(vit):
        loss = lambda vit: jnp.sum(jnp.sin(vit(pixels[:1])))
        return nnx.jit(nnx.value_and_grad(loss))(vit)

    want, want_grads = run(vit)
    for changes in (dict(unroll=True), dict(remat=True)):
        got, grads = run(_with(vit, **changes))
        np.testing.assert_allclose(got, want, rtol=1e-6)
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4), grads, want_grads
        )


def test_gradients_reach_every_parameter(vit, pixels):
    grads = nnx.jit(nnx.grad(lambda vit: jnp.sum(jnp.sin(vit(pixels[:1])))))(vit)
    for path, grad in nnx.to_flat_state(grads):
        # The softmax does not see what all keys share.
        if path[-2:] != ("k", "bias"):
            assert float(jnp.abs(grad[...]).max()) > 1e-4, path


def test_uint8_frames_are_normalised_inside(vit):
    frames = np.random.default_rng(0).integers(0, 256, (2, 90, 90, 3), np.uint8)
    want = encode(vit, jnp.asarray(frames, jnp.float32) / 127.5 - 1)
    close(encode(vit, jnp.asarray(frames)), want)


def test_frames_do_not_affect_each_other(vit, pixels):
    together = encode(vit, pixels)
    alone = encode(vit, pixels[1:])
    close(together[1:], alone)


def test_pixels_that_fill_no_patch_are_left_out(vit, pixels):
    changed = pixels.at[:, 84:].add(1).at[:, :, 84:].add(1)
    np.testing.assert_array_equal(encode(vit, pixels), encode(vit, changed))


def test_bfloat16_is_near_float32(vit, pixels):
    got = encode(_with(vit, dtype="bfloat16"), pixels)
    want = encode(vit, pixels)
    assert got.dtype == jnp.bfloat16
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert error < 0.01  # A rounding to bfloat16 is up to 0.004.


def test_so400m_at_384_has_its_published_sizes():
    cfg = VitConfig(
        image_size=384,
        patch_size=14,
        embed_dim=1152,
        depth=27,
        num_heads=16,
        mlp_dim=4304,
    )
    vit = _abstract(cfg)
    assert cfg.num_tokens == 729
    block = 4 * 1152 * 1153 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    want = 26 * block + (3 * 14**2 + 1 + 729) * 1152
    assert sum(p.size for p in jax.tree.leaves(nnx.state(vit))) == want


def test_what_cannot_be_an_encoder_says_why(vit, pixels):
    with pytest.raises(ValueError, match="depth=1 leaves no second-to-last block"):
        dataclasses.replace(CFG, depth=1)
    with pytest.raises(ValueError, match="embed_dim=64 must be a multiple of"):
        BlockConfig(embed_dim=64, num_heads=5, mlp_dim=8)
    with pytest.raises(ValueError, match=r"\(2, 84, 84, 3\) are not B 90 90 3"):
        vit(pixels[:, :84, :84])
