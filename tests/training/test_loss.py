"""The loss: which tokens are targets, what averages, what is the same by parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from timeviper_jax.data.examples import Batch
from timeviper_jax.training import cross_entropy
from timeviper_jax.training.loss import _exact, check_answers, find_targets
from timeviper_jax.training.metrics import Mean

# Two samples in a row of twelve, then padding; the answers are 13 14 and 23.
TOKENS = [[10, 11, 12, 13, 14, 20, 21, 22, 23, 0, 0, 0]]
SEGMENTS = [[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]]
TARGETS = [[0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0]]


def _batch(targets=TARGETS):
    batch = Batch(
        tokens=np.array(TOKENS, np.int32),
        roles=np.zeros((1, 12), np.int32),
        segment_ids=np.array(SEGMENTS, np.int32),
        loss_mask=np.array(targets, bool),
        frame_times=np.zeros((1, 0), np.float32),
        num_segments=2,
    )
    return jax.tree.map(jnp.asarray, batch)


def _positions(*positions):
    return jnp.array([positions], jnp.int32)


def test_a_token_predicts_the_one_after_it():
    targets = find_targets(_batch(), _positions(*range(12)), 4)
    assert targets.index.tolist()[0][:3] == [2, 3, 7]
    assert targets.tokens.tolist()[0][:3] == [13, 14, 23]
    assert targets.segment_ids.tolist()[0][:3] == [1, 1, 2]
    assert targets.valid.tolist() == [[True, True, True, False]]


def test_targets_follow_the_tokens_that_survive():
    # Positions 0, 1 and 6 have left: what remains has moved up.
    targets = find_targets(_batch(), _positions(2, 3, 4, 5, 7, 8, 9, 10, 11), 4)
    assert targets.index.tolist()[0][:3] == [0, 1, 4]
    assert targets.tokens.tolist()[0][:3] == [13, 14, 23]


def test_a_sample_is_not_predicted_from_the_one_before():
    first_of_second = [[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]]
    targets = find_targets(_batch(first_of_second), _positions(*range(12)), 4)
    assert not targets.valid.any()


def test_answers_that_do_not_fit_are_an_error():
    check_answers(_batch(), 3)
    with pytest.raises(ValueError, match="3 supervised tokens and answer_tokens=2"):
        check_answers(_batch(), 2)


def test_exact_counts_samples_not_tokens():
    targets = find_targets(_batch(), _positions(*range(12)), 4)
    one_wrong = jnp.array([[True, False, True, False]])
    mean = _exact(one_wrong, targets, 2)
    assert (mean.total, mean.count) == (1, 2)


def test_a_mean_of_nothing_has_no_weight():
    mean = Mean.of(jnp.array([5.0, 7.0]), jnp.array([False, False]))
    assert (mean.total, mean.count) == (0, 0)


@pytest.mark.parametrize("at_once", [2**20, 40, 7])
def test_a_loss_by_parts_is_that_of_all_logits(monkeypatch, at_once):
    monkeypatch.setattr(cross_entropy, "_AT_ONCE", at_once)
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, 5, 6))
    head = jax.random.normal(keys[1], (6, 13))
    targets = jax.random.randint(keys[2], (2, 5), 0, 13)
    weights = jax.random.normal(keys[3], (2, 5))

    def by_parts(hidden, head):
        losses, correct = cross_entropy.cross_entropy(
            hidden, head, targets, dtype="float32"
        )
        return jnp.sum(weights * losses), (losses, correct)

    def at_a_time(hidden, head):
        logits = hidden @ head
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        correct = jnp.argmax(logits, axis=-1) == targets
        return jnp.sum(weights * losses), (losses, correct)

    got, want = (
        jax.grad(f, argnums=(0, 1), has_aux=True)(hidden, head)
        for f in (by_parts, at_a_time)
    )
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


def test_no_more_logits_stand_at_once_than_allowed(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_AT_ONCE", 40)
    hidden, head = jnp.ones((2, 5, 6)), jnp.ones((6, 13))
    targets = jnp.zeros((2, 5), jnp.int32)

    def loss(hidden):
        losses, _ = cross_entropy.cross_entropy(hidden, head, targets, dtype="float32")
        return losses.sum()

    program = jax.jit(jax.grad(loss)).lower(hidden).as_text()
    assert "tensor<3x13xf32>" in program and "tensor<10x13xf32>" not in program
