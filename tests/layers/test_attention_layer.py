"""Attention's queries may grow with the logarithm of what they see."""

import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from timeviper_jax.layers.attention import Attention, AttentionConfig


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
