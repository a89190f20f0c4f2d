"""Choosing a token: what may be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from timeviper_jax.inference.sampling import Decoding, sample

P = np.array([0.1, 0.4, 0.3, 0.2])
LOGITS = jnp.log(jnp.asarray(P))[None]


def frequencies(**options) -> np.ndarray:
    decoding = Decoding(**options)
    rows = jnp.broadcast_to(LOGITS, (4000, 4))
    drawn = jax.jit(lambda key: sample(rows, key, decoding))(jax.random.key(0))
    return np.bincount(np.asarray(drawn), minlength=4) / 4000


@pytest.mark.parametrize(
    "options, want",
    [
        (dict(), [0, 1, 0, 0]),
        (dict(temperature=1.0), P),
        (dict(temperature=0.5), P**2 / np.sum(P**2)),
        (dict(temperature=1.0, top_k=2), [0, 4 / 7, 3 / 7, 0]),
        (dict(temperature=1.0, top_p=0.75), [0, 4 / 9, 3 / 9, 2 / 9]),
        (dict(temperature=1.0, top_p=0.01), [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(options, want):
    np.testing.assert_allclose(frequencies(**options), want, atol=0.03)


def test_of_equal_tokens_no_more_are_drawn_than_the_top_k():
    decoding = Decoding(temperature=1.0, top_k=2)
    drawn = sample(jnp.zeros((400, 4)), jax.random.key(0), decoding)
    assert len(set(np.asarray(drawn).tolist())) == 2


def test_options_that_mean_nothing_are_errors():
    for options in (dict(top_p=0.0), dict(temperature=-1.0), dict(max_tokens=0)):
        with pytest.raises(ValueError, match="must|lies"):
            Decoding(**options)
