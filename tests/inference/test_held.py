"""Thinning on the host follows the rules that a compiled pass follows."""

import json

import numpy as np
from golden_cases import GOLDEN

from timeviper_jax.data.examples import Role
from timeviper_jax.inference import held
from timeviper_jax.inference.held import Held

T, V, P = Role.TEXT, Role.VISION, Role.PAD
ROLES = np.array([[T, V, V, V, V, V, T], [T, V, V, V, T, P, P]], np.int32)
COUNTS = np.array([5, 3])


def test_uniform_indices_are_as_recorded():
    tables = json.loads((GOLDEN / "rounding_tables.json").read_text())
    for present, kept, indices in tables["linspace_cpu"]:
        assert held.uniform_indices(present, kept).tolist() == indices


def test_uniform_thinning_keeps_text_and_a_share_of_the_original_count():
    kept = held.kept_uniform(ROLES, COUNTS, 0.6)
    assert kept.astype(int).tolist() == [[1, 1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 1, 0, 0]]
    # 40 % of ten and of six, of which half have gone before.
    kept = held.kept_uniform(ROLES, 2 * COUNTS, 0.4)
    assert kept.astype(int).tolist() == [[1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0, 0]]


def test_ties_go_to_the_earlier_token():
    scores = np.array([[9, 1, 2, 2, 0, 2, 9], [9, 0, 0, 0, 9, 9, 9]], np.float32)
    kept = held.kept_best(ROLES, COUNTS, 0.4, scores)
    assert kept.astype(int).tolist() == [[1, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0, 0]]


def test_what_is_split_closes_up():
    x = np.arange(14, dtype=np.float32).reshape(2, 7, 1)
    rest, gone = held.split(
        Held(x=x, roles=ROLES), held.kept_uniform(ROLES, COUNTS, 0.6)
    )
    assert rest.x[..., 0].tolist() == [[0, 1, 3, 5, 6], [7, 8, 11, 0, 0]]
    assert gone.x[..., 0].tolist() == [[2, 4], [9, 10]]
    assert gone.lengths.tolist() == [2, 2]


def test_attention_is_a_softmax_over_what_is_visible():
    logits = np.log(np.array([[[1, 2, 5], [3, 3, 5]]], np.float32))
    scores = held.mean_attention(logits, np.array([[True, True, False]]))
    np.testing.assert_allclose(scores, [[(1 / 3 + 1 / 2) / 2, 7 / 12, 0]], rtol=1e-6)
