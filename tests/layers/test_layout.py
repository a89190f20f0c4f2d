"""Which tokens are real, and how many of its own sample each of them sees."""

import jax.numpy as jnp

from timeviper_jax.layers.layout import Layout


def test_each_token_counts_its_own_sample_up_to_itself():
    layout = Layout(segment_ids=jnp.array([[1, 1, 1, 2, 3, 3, 0, 0]]), packed=True)
    assert layout.counts()[0, :6].tolist() == [1, 2, 3, 1, 1, 2]
    assert layout.valid.tolist() == [[True] * 6 + [False] * 2]
    assert layout.lengths.tolist() == [6]


def test_a_row_of_one_sample_has_no_boundaries():
    layout = Layout(segment_ids=jnp.array([[1, 1, 1, 0]]))
    assert layout.boundaries is None
    assert layout.counts()[0, :3].tolist() == [1, 2, 3]
