"""Redundancy: which frames changed, the same however the frames come."""

import numpy as np
import pytest

from tests.data.conftest import read
from timeviper_jax.data.images import Fit
from timeviper_jax.data.redundancy import Changes, changed_times, difference
from timeviper_jax.data.video import read_frames


def noisy(frames: int = 12, size: int = 10) -> np.ndarray:
    """Shots of one to three frames with a little noise."""
    rng = np.random.default_rng(0)
    shots = rng.integers(0, 256, (frames, size, size, 3))
    still = np.repeat(shots, rng.integers(1, 4, frames), axis=0)[:frames]
    return np.clip(still + rng.integers(-2, 3, still.shape), 0, 255).astype(np.uint8)


def test_with_threshold_zero_every_frame_changed():
    assert Changes(0.0)(np.repeat(noisy(), 2, axis=0)).all()


def test_a_video_at_rest_changes_once():
    assert Changes(1e-6)(np.repeat(noisy()[:1], 9, axis=0)).tolist() == [True] + 8 * [
        False
    ]


def test_the_first_frame_changed_whatever_the_threshold():
    assert Changes(1.0)(noisy()).tolist() == [True] + 11 * [False]


@pytest.mark.parametrize("portion", [1, 3, 7])
def test_portions_are_as_the_whole(portion):
    frames = noisy(frames=40)
    whole, changes = Changes(0.05)(frames), Changes(0.05)
    parts = [changes(frames[i : i + portion]) for i in range(0, 40, portion)]
    assert 1 < whole.sum() < 40
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_frame_is_near_the_one_it_repeats():
    frames = noisy(frames=40)
    changed = Changes(0.05)(frames)
    stands_for = frames[changed][np.cumsum(changed) - 1]
    far = [difference(*pair) for pair in zip(stands_for, frames, strict=True)]
    assert max(far) < 0.05


def test_slow_change_is_noticed():
    # No two neighbours differ by 2 levels, the ends by 100.
    levels = np.arange(101, dtype=np.uint8)[:, None, None, None]
    changed = Changes(10 / 255)(np.broadcast_to(levels, (101, 8, 8, 3)))
    assert np.flatnonzero(changed).tolist() == list(range(0, 101, 10))


def test_a_small_thing_that_moves_is_seen():
    still = np.zeros((64, 64, 3), np.uint8)
    moved = still.copy()
    moved[50:54, 10:14] = 255
    assert difference(still, moved) == pytest.approx(4 * 4 / 16**2)
    assert difference(still, moved) > 10 * np.mean(moved / 255)


def test_parts_need_not_be_of_one_size():
    black = np.zeros((7, 3, 3), np.uint8)
    assert difference(black, np.full_like(black, 255)) == pytest.approx(1)


def test_what_is_skipped_leaves_the_others_their_times(film):
    # Asked four times a second, a film of a frame a second repeats each of them.
    path = film("slow.mp4", 6)
    times = np.arange(24) / 4 + 0.125
    kept = changed_times(path, times, Fit(size=64), 0.02)
    assert kept.tolist() == [0.125, 1.125, 2.125, 3.125, 4.125, 5.125]
    assert read(read_frames(path, kept, 64)) == list(range(6))


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_share_is_an_error(threshold):
    with pytest.raises(ValueError, match=f"threshold={threshold} is not a share"):
        Changes(threshold)
