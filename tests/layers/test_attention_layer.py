"""Attention's queries may grow with the logarithm of what they see."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from timeviper_jax.layers import attention
from timeviper_jax.layers.attention import Attention, AttentionConfig
from timeviper_jax.layers.cache import KVCache, Slots
from timeviper_jax.layers.layout import Layout


def test_queries_scale_with_the_log_of_what_they_see():
    cfg = AttentionConfig(
        embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, log_base=4.0
    )
    layer = tiny.build(lambda: Attention(cfg, rngs=nnx.Rngs(0)))
    x = tiny.embeddings("tttt", dim=8)[None]
    got = layer.query(jnp.asarray(x), jnp.array([[1, 2, 4, 16]]))
    # A lone token is treated as one of two: its only weight is 1 whatever its logit.
    want = layer.q(x) * np.array([0.5, 0.5, 1, 2])[:, None, None]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("platform, capacity", [("tpu", 24), ("tpu", 21), ("cpu", 24)])
def test_tokens_one_at_a_time_are_those_of_a_chunk(platform, capacity, monkeypatch):
    # On TPU a cache of whole tiles is written a tile at a time, else a token.
    monkeypatch.setattr(attention, "target_platform", lambda: platform)
    cfg = AttentionConfig(embed_dim=8, num_heads=2, num_kv_heads=2, head_dim=4)
    layer = tiny.build(lambda: Attention(cfg, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 21, 8)), jnp.float32)
    # Another layer's part, which must stay as it is, and what is behind the tokens.
    fill = jnp.full((2, 2, 2, capacity, 4), 7.0)

    def read(cache, slots, x):
        layout = Layout(segment_ids=jnp.ones(x.shape[:2], jnp.int32))
        y, cache = layer(x, layout, cache, slots, jnp.array(1))
        return y, cache, slots.write(layout.valid)

    state = (
        KVCache(k=fill, v=fill),
        Slots(valid=jnp.zeros((2, capacity), bool), used=jnp.zeros((), jnp.int32)),
    )
    whole, want, _ = jax.jit(read)(*state, x)
    step, tokens = jax.jit(read), []
    for t in range(x.shape[1]):
        y, *state = step(*state, x[:, t : t + 1])
        tokens.append(y)
    np.testing.assert_allclose(jnp.concatenate(tokens, 1), whole, atol=1e-5)
    np.testing.assert_allclose(state[0].k, want.k, atol=1e-6)
    np.testing.assert_allclose(state[0].v, want.v, atol=1e-6)
    np.testing.assert_array_equal(state[0].k[0], fill[0])


def test_writing_tokens_copies_no_caches_on_cpu():
    cfg = AttentionConfig(embed_dim=8, num_heads=2, num_kv_heads=2, head_dim=4)
    layers = [tiny.build(lambda: Attention(cfg, rngs=nnx.Rngs(0)))] * 2

    def write(state):
        x, cache, slots = state
        layout = Layout(segment_ids=jnp.ones(x.shape[:2], jnp.int32))
        for i, layer in enumerate(layers):
            x, cache = layer(x, layout, cache, slots, i)
        return x, cache, slots.write(layout.valid)

    def run(k, v):
        slots = Slots(valid=jnp.zeros((3, 2048), bool), used=jnp.zeros((), jnp.int32))
        state = jnp.zeros((3, 1, 8)), KVCache(k=k, v=v), slots
        _, cache, _ = jax.lax.fori_loop(0, 9, lambda _, state: write(state), state)
        return cache.k, cache.v

    k = v = jnp.zeros((2, 3, 2, 2048, 4))  # More than a block of keys: in a loop.
    program = jax.jit(run, donate_argnums=(0, 1)).lower(k, v).compile().as_text()
    assert " while(" in program
    assert not re.findall(r"f32\[2,3,2,[\d,]+\]\S* copy\(", program)
