"""Images: every pixel as the release's transform makes it."""

import numpy as np
import pytest

from tests.golden_cases import load
from timeviper_jax.data.images import normalise, resize_naive

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("i", range(4))
def test_release_resizes_and_normalises_alike(i):
    config, arrays = load("preproc_siglip-vit-so400m-384px_resize-naive")
    resized = resize_naive(arrays[f"in.image.{i}"], config["img_size"])
    want = arrays[f"out.pixel_values.{i}"].transpose(1, 2, 0)
    np.testing.assert_allclose(normalise(resized, HALF, HALF), want, atol=1e-6)


def test_normalising_is_per_colour():
    frames = np.full((1, 1, 1, 3), 255, np.uint8)
    got = normalise(frames, (0.0, 0.5, 1.0), (1.0, 0.25, 2.0))
    np.testing.assert_allclose(got[0, 0, 0], [1.0, 2.0, 0.0])


def test_an_image_of_the_right_size_is_left_alone():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(resize_naive(image, 8), image)


def test_enlarging_a_flat_image_keeps_it_flat():
    image = np.full((3, 5, 3), (10, 200, 255), np.uint8)
    np.testing.assert_array_equal(
        resize_naive(image, 7), np.full((7, 7, 3), (10, 200, 255))
    )
