"""Redundancy: which frames changed, the same however the frames come."""

import numpy as np
import pytest

from timeviper_jax.data.redundancy import Changes, difference


def film(seed: int = 0, frames: int = 12, size: int = 10) -> np.ndarray:
    """Shots of one to three frames with a little noise."""
    rng = np.random.default_rng(seed)
    shots = rng.integers(0, 256, (frames, size, size, 3))
    still = np.repeat(shots, rng.integers(1, 4, frames), axis=0)[:frames]
    return np.clip(still + rng.integers(-2, 3, still.shape), 0, 255).astype(np.uint8)


def watch(frames, threshold: float) -> tuple[np.ndarray, Changes]:
    changes = Changes(frames, threshold)
    return np.stack(list(changes)), changes


def test_threshold_zero_passes_every_frame_on():
    frames = np.repeat(film(), 2, axis=0)
    passed, changes = watch(frames, 0.0)
    np.testing.assert_array_equal(passed, frames)
    np.testing.assert_array_equal(changes.sources, np.arange(24))


def test_a_video_at_rest_is_one_frame():
    passed, changes = watch(np.repeat(film()[:1], 9, axis=0), 1e-6)
    assert len(passed) == 1
    assert changes.sources.tolist() == [0] * 9
    assert changes.kept.tolist() == [True] + [False] * 8


def test_the_first_frame_is_passed_on_whatever_the_threshold():
    passed, _ = watch(film(), 1.0)
    np.testing.assert_array_equal(passed, film()[:1])


def test_merged_frames_are_near_those_they_stand_for():
    frames = film(frames=40)
    passed, changes = watch(frames, 0.05)
    assert 1 < len(passed) < 40
    merged = passed[changes.sources]
    np.testing.assert_array_equal(merged[changes.kept], frames[changes.kept])
    far = [difference(one, other) for one, other in zip(merged, frames, strict=True)]
    assert max(far) < 0.05


def test_skipped_frames_leave_the_others_their_times():
    frames, times = film(frames=40), np.arange(40) + 0.5
    passed, changes = watch(frames, 0.05)
    for frame, time in zip(passed, times[changes.kept], strict=True):
        np.testing.assert_array_equal(frame, frames[int(time)])


def test_slow_change_is_noticed():
    # No two neighbours differ by 2 levels, the ends by 100.
    frames = np.arange(101, dtype=np.uint8)[:, None, None, None]
    passed, _ = watch(np.broadcast_to(frames, (101, 8, 8, 3)), 10 / 255)
    assert passed[:, 0, 0, 0].tolist() == list(range(0, 101, 10))


def test_a_small_thing_that_moves_is_seen():
    still = np.zeros((64, 64, 3), np.uint8)
    moved = still.copy()
    moved[50:54, 10:14] = 255
    assert difference(still, moved) == pytest.approx(16 / 16**2)
    assert difference(still, moved) > 10 * np.mean(moved / 255)


def test_parts_need_not_be_of_one_size():
    black = np.zeros((7, 3, 3), np.uint8)
    assert difference(black, np.full_like(black, 255)) == pytest.approx(1)


def test_frames_are_looked_at_only_as_they_are_asked_for():
    seen = []

    def frames():
        for i, frame in enumerate(film()):
            seen.append(i)
            yield frame

    changes = Changes(frames(), 0.0)
    next(iter(changes))
    assert seen == [0]
    assert changes.sources.tolist() == [0]


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_share_is_an_error(threshold):
    with pytest.raises(ValueError, match=f"threshold={threshold} is not a share"):
        Changes(film(), threshold)
