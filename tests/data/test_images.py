"""Images: every pixel as the release's transform makes it."""

import numpy as np
import pytest
from PIL import Image

from tests.golden_cases import load
from timeviper_jax.data.images import (
    Fit,
    fill_of,
    normalise,
    pad_to_square,
    resize_crop,
    resize_naive,
)

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("resize", ["resize-naive", "letterbox"])
def test_release_resizes_and_normalises_alike(resize, i):
    config, arrays = load(f"preproc_siglip-vit-so400m-384px_{resize}")
    fit = Fit(size=config["img_size"], resize=resize, fill=fill_of(HALF))
    resized = fit(arrays[f"in.image.{i}"])
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


def test_letterbox_leaves_an_odd_pixel_over():
    image = np.zeros((2, 5, 3), np.uint8)
    got = pad_to_square(image, (9, 8, 7))
    np.testing.assert_array_equal(got[:, :, 0], [[9] * 5, [0] * 5, [0] * 5, [9] * 5])
    np.testing.assert_array_equal(got[0, 0], [9, 8, 7])
    assert fill_of((0.485, 0.456, 0.406)) == (123, 116, 103)


@pytest.mark.parametrize(
    ("shape", "scaled", "corner"),
    [  # Longer sides round down; of two middles the even one is cut.
        ((60, 100), (30, 50), (0, 10)),
        ((101, 60), (50, 30), (10, 0)),
        ((37, 41), (30, 33), (0, 2)),
        ((30, 35), (30, 35), (0, 2)),
    ],
)
def test_crop_is_the_middle_of_what_pillow_scales(shape, scaled, corner):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    (height, width), (top, left) = scaled, corner
    want = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    want = want.crop((left, top, left + 30, top + 30))
    np.testing.assert_array_equal(resize_crop(image, 30), np.asarray(want))


def test_what_does_not_fit_says_why():
    with pytest.raises(ValueError, match="resize='stretch' is not one of"):
        Fit(size=4, resize="stretch")
