"""Merging: repeats have the features of what they repeat, in any portions."""

import numpy as np
import pytest

from timeviper_jax.inference.merging import Merging

SHOWN = [5, 5, 5, 9, 9, 5, 5, 7, 7, 7, 7, 7]


class Encoder:
    """A frame's feature is its level; remembers what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, frames):
        self.given += frames[:, 0, 0, 0].tolist()
        return frames[:, :1, 0, :1].astype(np.float16)


def frames(levels: list[int]) -> np.ndarray:
    return np.tile(np.array(levels, np.uint8)[:, None, None, None], (1, 4, 4, 3))


@pytest.mark.parametrize("portion", [1, 2, 5, 12])
def test_only_what_changed_is_encoded_and_stands_for_the_rest(portion):
    encoder = Encoder()
    merging = Merging(encoder, 0.005)
    parts = [
        merging(frames(SHOWN[i : i + portion])) for i in range(0, len(SHOWN), portion)
    ]
    assert encoder.given == [5, 9, 5, 7]
    assert np.concatenate(parts)[:, 0, 0].tolist() == SHOWN
    assert (merging.seen, merging.encoded) == (12, 4)


def test_with_threshold_zero_nothing_is_merged():
    encoder = Encoder()
    rng = np.random.default_rng(0)
    some = rng.integers(0, 256, (20, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(Merging(encoder, 0.0)(some), Encoder()(some))
    assert len(encoder.given) == 20
