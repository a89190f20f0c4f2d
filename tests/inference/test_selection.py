"""Thinning on the host follows the rules that a compiled pass follows."""

import json

import numpy as np
from golden_cases import GOLDEN

from timeviper_jax.data.examples import Role
from timeviper_jax.inference import selection
from timeviper_jax.inference.selection import Spread
from timeviper_jax.llm.transv import Stage

T, V, P = Role.TEXT, Role.VISION, Role.PAD
ROLES = np.array([[T, V, V, V, V, V, T], [T, V, V, V, T, P, P]], np.int32)
COUNTS = np.array([5, 3])


def kept_uniform(keep: float, counts: np.ndarray) -> list[list[int]]:
    present = np.count_nonzero(ROLES == V, axis=1)
    (spread,) = selection.spreads([Stage(layer=0, keep=keep)], counts, present)
    return spread.keeps(ROLES, np.zeros(2, int)).astype(int).tolist()


def test_uniform_indices_are_as_recorded():
    tables = json.loads((GOLDEN / "rounding_tables.json").read_text())
    for present, kept, indices in tables["linspace_cpu"]:
        sizes = np.array(present), np.array(min(kept, present))
        chosen = selection.uniform_kept(np.arange(present), *sizes)
        assert np.flatnonzero(chosen).tolist() == indices


def test_uniform_thinning_keeps_text_and_a_share_of_the_original_count():
    kept = kept_uniform(0.6, COUNTS)
    assert kept == [[1, 1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 1, 0, 0]]
    # 40 % of ten and of six, of which half have gone before.
    kept = kept_uniform(0.4, 2 * COUNTS)
    assert kept == [[1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0, 0]]


def test_every_block_is_spread_by_itself_however_it_is_cut():
    spread = Spread(present=np.array([5]), kept=np.array([3]))
    roles = np.full((1, 13), V, np.int32)
    want = [1, 0, 1, 0, 1] + [1, 0, 1, 0, 1] + [1, 0, 1]
    for cut in range(13):
        first = spread.keeps(roles[:, :cut], np.array([0]))
        rest = spread.keeps(roles[:, cut:], np.array([cut]))
        assert [*first[0].astype(int), *rest[0].astype(int)] == want


def test_marked_positions_close_up():
    mask = np.array([[0, 1, 0, 1], [1, 0, 0, 0]], bool)
    assert selection.closed_up(mask).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]


def test_ties_go_to_the_earlier_token():
    scores = np.array([[9, 1, 2, 2, 0, 2, 9], [9, 0, 0, 0, 9, 9, 9]], np.float32)
    kept = selection.kept_best(ROLES, COUNTS, 0.4, scores)
    assert kept.astype(int).tolist() == [[1, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0, 0]]


def test_attention_is_a_softmax_over_what_is_visible():
    logits = np.log(np.array([[[1, 2, 5], [3, 3, 5]]], np.float32))
    scores = selection.mean_attention(logits, np.array([[True, True, False]]))
    np.testing.assert_allclose(scores, [[(1 / 3 + 1 / 2) / 2, 7 / 12, 0]], rtol=1e-6)
