"""Resized positions: the release's, torch's weights, and what resizing must keep."""

import numpy as np
import pytest

from tests.golden_cases import load
from timeviper_jax.vision.positions import (
    cubic,
    linear,
    resize_grid,
    resize_time,
    smooth_cubic,
)


def test_release_resizes_time_and_grid_alike():
    about, arrays = load("vit_internvideo2_posinterp")
    clip = arrays["in.pos_embed"][0, 1:].reshape(about["orig_t"], -1, 64)
    got = resize_grid(
        resize_time(clip, about["new_t"]), about["new_grid"], antialias=False
    )
    want = arrays["out.pos_embed"][0, 1:]
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=2e-6)
    image = resize_grid(arrays["in.img_pos_embed"][0, 1:], 6, antialias=False)
    np.testing.assert_allclose(image, arrays["out.img_pos_embed"][0, 1:], atol=2e-6)


@pytest.mark.parametrize(
    ("weights", "old", "new", "first_row"),
    [  # What torch's `interpolate` takes of each old point for the first new one.
        (smooth_cubic, 5, 2, [0.3470952, 0.4156204, 0.2394127, 0.0291551, -0.0312833]),
        (cubic, 5, 2, [0.2265625, 0.8789062, -0.1054688, 0, 0]),
        (smooth_cubic, 2, 4, [1.0882353, -0.0882353]),
        (cubic, 2, 4, [1.1054688, -0.1054688]),
        (linear, 2, 4, [1, 0]),
        (linear, 4, 2, [0.5, 0.5, 0, 0]),
    ],
)
def test_weights_are_torchs(weights, old, new, first_row):
    got = weights(old, new)
    np.testing.assert_allclose(got[0], first_row, atol=1e-7)
    np.testing.assert_allclose(got[-1], first_row[::-1], atol=1e-7)
    np.testing.assert_allclose(got.sum(1), np.ones(new), atol=1e-12)


def test_a_grid_of_the_right_size_is_left_alone():
    table = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float16)
    assert resize_grid(table, 3, antialias=True) is table
    assert resize_grid(table, 2, antialias=True).dtype == np.float16
    assert resize_time(table[None], 1).base is table


def test_rows_and_columns_keep_their_places():
    rows, columns = np.mgrid[:6, :6].astype(np.float32)
    table = np.stack([rows, columns], -1).reshape(36, 2)
    got = resize_grid(table, 3, antialias=True).reshape(3, 3, 2)
    np.testing.assert_allclose(got[:, 1, 0], got[1, :, 1], atol=1e-6)
    np.testing.assert_allclose(got[1, 1], [2.5, 2.5], atol=1e-6)
    assert np.ptp(got[1, :, 0]) < 1e-6


def test_what_is_no_grid_says_so():
    with pytest.raises(ValueError, match="17 positions are not a square grid"):
        resize_grid(np.zeros((17, 4)), 2, antialias=False)
