"""Token merging: the release's merges, and what merging must never change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden_cases import load
from timeviper_jax.vision.tome import merge, merge_schedule

CASES = (
    "tome_17_to16",
    "tome_256x128_to16",
    "tome_36x64_to4",
    "tome_desc",
    "tome_fused_mlp",
)
jitted_merge = jax.jit(merge, static_argnums=1, static_argnames=("heads", "order"))


def _tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _directions(degrees):
    """One image of unit vectors in the plane."""
    angles = np.deg2rad([degrees])
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


@pytest.mark.parametrize(
    ("num_tokens", "keep", "schedule"),
    [
        (729, 16, (364, 182, 91, 46, 23, 7)),
        (36, 4, (18, 9, 4, 1)),
        (16, 4, (8, 4)),
        (3, 1, (1, 1)),
        (5, 5, ()),
    ],
)
def test_schedule_halves_until_the_target(num_tokens, keep, schedule):
    assert merge_schedule(num_tokens, keep) == schedule


@pytest.mark.parametrize("case", CASES)
def test_release_merges_alike(case):
    config, arrays = load(case)
    keep, order = config["num_compressed_tokens"], config["token_order"]
    x = arrays["in.x"]
    assert list(merge_schedule(x.shape[1], keep)) == config["r_schedule"]
    merged, sizes = jitted_merge(x, keep, order=order)
    np.testing.assert_allclose(merged, arrays["out.merged"], atol=1e-6)
    want = arrays["out.sizes_before_reorder"][..., 0]
    if order == "descending":
        want = -np.sort(-want)
    np.testing.assert_array_equal(sizes, want)


def test_a_step_merges_the_most_alike_by_hand():
    # Sources 0, 90 and 200 degrees; destinations 10, 95 and 180.
    tokens = _directions([0, 10, 90, 95, 200, 180])
    merged, sizes = jitted_merge(tokens, 4, heads=1)
    t = tokens[0]
    want = [t[4], (t[0] + t[1]) / 2, (t[2] + t[3]) / 2, t[5]]
    np.testing.assert_allclose(merged[0], want, atol=1e-6)
    np.testing.assert_array_equal(sizes[0], [1, 2, 2, 1])


def test_unmerged_sources_stand_by_descending_likeness_before_destinations():
    # Sources 0, 90, 180 and 270 are 8, 2, 4 and 6 degrees from a destination.
    tokens = _directions([0, 8, 90, 92, 180, 184, 270, 276])
    merged, sizes = jitted_merge(tokens, 7, heads=1)
    t = tokens[0]
    want = [t[4], t[6], t[0], t[1], (t[2] + t[3]) / 2, t[5], t[7]]
    np.testing.assert_allclose(merged[0], want, atol=1e-6)
    np.testing.assert_array_equal(sizes[0], [1, 1, 1, 1, 2, 1, 1])


def test_a_later_step_weighs_by_size():
    tokens = _directions([0, 4, 2, 40])
    merged, sizes = jitted_merge(tokens, 1, heads=1)
    np.testing.assert_allclose(merged[0, 0], tokens[0].mean(0), atol=1e-6)
    np.testing.assert_array_equal(sizes, [[4]])


def test_of_equal_tokens_the_earlier_merge_first():
    merged, sizes = jitted_merge(jnp.ones((1, 8, 16)), 5, heads=4)
    # Sources 0, 2 and 4 go to the first destination; source 6 stays.
    np.testing.assert_array_equal(sizes, [[1, 4, 1, 1, 1]])
    np.testing.assert_array_equal(merged, np.ones((1, 5, 16)))


@pytest.mark.parametrize("shape", [(729, 1152), (17, 64)])
def test_equal_tokens_tie_exactly_wherever_they_stand(shape):
    # Two kinds of tokens, at right angles: all decisions of the step are ties.
    V, E = shape
    rng = np.random.default_rng(0)
    kinds = np.zeros((2, E), np.float32)
    kinds[0, ::2], kinds[1, 1::2] = rng.normal(size=(2, E // 2))
    kind = rng.integers(0, 2, V)
    keep = V - V // 4
    _, sizes = jitted_merge(kinds[kind][None], keep)
    sources, destinations = kind[::2], kind[1::2]
    first = [np.flatnonzero(destinations == k)[0] for k in (0, 1)]
    merged = np.arange(len(sources)) < V - keep  # All are 1 away: the earliest merge.
    want = np.ones(len(destinations))
    np.add.at(want, [first[k] for k in sources[merged]], 1)
    np.testing.assert_array_equal(sizes[0, -len(destinations) :], want)


def test_orders_sort_by_size_and_keep_the_raw_order_of_equals():
    tokens = _tokens(2, 33, 32)
    raw, sizes = jitted_merge(tokens, 8)
    for order, sign in (("ascending", 1), ("descending", -1)):
        rank = np.argsort(sign * sizes, axis=1, kind="stable")
        got, got_sizes = jitted_merge(tokens, 8, order=order)
        np.testing.assert_array_equal(
            got, np.take_along_axis(np.array(raw), rank[..., None], 1)
        )
        np.testing.assert_array_equal(
            got_sizes, np.take_along_axis(np.array(sizes), rank, 1)
        )


@pytest.mark.parametrize("keep", [1, 15, 36])
def test_every_token_is_in_exactly_one_merged_token(keep):
    tokens = _tokens(2, 37, 32)
    merged, sizes = jitted_merge(tokens, keep)
    np.testing.assert_array_equal(sizes.sum(-1), [37, 37])
    np.testing.assert_allclose(
        jnp.einsum("BVE,BV->BE", merged, sizes), tokens.sum(1), atol=2e-5
    )


def test_images_do_not_affect_each_other():
    tokens = _tokens(3, 16, 32)
    together, _ = jitted_merge(tokens, 4)
    alone, _ = jitted_merge(tokens[1:2], 4)
    np.testing.assert_allclose(together[1:2], alone, atol=1e-6)


def test_a_zero_token_is_finite_in_values_and_gradients():
    tokens = _tokens(1, 8, 16).at[0, 3].set(0)
    loss = lambda x: jitted_merge(x, 2)[0].sum()
    value, grad = jax.value_and_grad(loss)(tokens)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_bfloat16_merges_in_float32():
    tokens = jnp.asarray(_tokens(2, 49, 32), jnp.bfloat16)
    merged, sizes = jitted_merge(tokens, 6)
    want, want_sizes = jitted_merge(tokens.astype(jnp.float32), 6)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, want.astype(jnp.bfloat16))
    np.testing.assert_array_equal(sizes, want_sizes)


def test_gradient_shares_out_by_size():
    tokens = _tokens(1, 16, 32)
    _, sizes = jitted_merge(tokens, 4)
    # d(merged_j)/d(token_i) is 1 / size_j for the tokens in it: weights sum to one.
    grad = jax.grad(lambda x: jitted_merge(x, 4)[0].sum())(tokens)
    np.testing.assert_allclose(grad.sum(1), np.full((1, 32), 4.0), atol=1e-5)
    shares, counts = np.unique(np.round(1 / grad[0, :, 0]), return_counts=True)
    want, times = np.unique(sizes[0], return_counts=True)
    np.testing.assert_array_equal(shares, want)
    np.testing.assert_array_equal(counts, want * times)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(keep=17), "keep=17 is outside 1..16"),
        (dict(keep=0), "keep=0 is outside 1..16"),
        (dict(keep=4, heads=5), "Width 32 does not divide into heads=5"),
    ],
)
def test_what_cannot_be_merged_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge(_tokens(1, 16, 32), **arguments)
