"""A file of features is found whole or not at all, and goes on where it was left."""

import fcntl
import os

import numpy as np
import pytest

from timeviper_jax.data.feature_file import FeatureFile, GrowingFile

SHAPE = (10, 2, 3)
WHOLE = np.random.default_rng(0).normal(size=SHAPE).astype(np.float16)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "ab" / "video.npy"


def test_frames_are_read_as_they_come_and_the_file_appears_when_whole(place):
    growing = GrowingFile(place, SHAPE)
    growing.append(WHOLE[:4])
    assert (growing.present, place.exists()) == (4, False)
    np.testing.assert_array_equal(growing[1:3], WHOLE[1:3])
    with pytest.raises(OSError, match="Frames 3 to 5 .* ends 24 bytes before"):
        growing[3:6]
    growing.append(WHOLE[4:])
    np.testing.assert_array_equal(np.load(place), WHOLE)
    np.testing.assert_array_equal(growing[3:12], WHOLE[3:])
    np.testing.assert_array_equal(FeatureFile(place)[:], WHOLE)
    assert FeatureFile(place, 6).shape == (6, 2, 3)
    np.testing.assert_array_equal(FeatureFile(place, 6)[4:9], WHOLE[4:6])


def test_what_comes_in_many_reads_is_whole(place, monkeypatch):
    """As beyond 2 GiB, which is the most that one call reads."""
    growing, preadv = GrowingFile(place, SHAPE), os.preadv
    growing.append(WHOLE)
    monkeypatch.setattr(os, "preadv", lambda f, to, at: preadv(f, [to[0][:7]], at))
    np.testing.assert_array_equal(FeatureFile(place)[2:9], WHOLE[2:9])
    assert FeatureFile(place)[4:4].shape == (0, 2, 3)


def test_a_file_that_another_writer_finishes_meanwhile_is_left_alone(
    place, monkeypatch
):
    first, flock = GrowingFile(place, SHAPE), fcntl.flock

    def after_the_first_is_done(*args):
        if not place.exists():
            first.append(WHOLE)
            first.close()
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", after_the_first_is_done)
    second = GrowingFile(place, SHAPE)
    assert second.present == 0
    second.append(WHOLE[:3])
    np.testing.assert_array_equal(np.load(place), WHOLE)


@pytest.mark.parametrize("clip, present", [(1, 7), (4, 4)])
def test_an_interrupted_writer_is_gone_on_with_from_its_last_whole_clip(
    place, clip, present
):
    first = GrowingFile(place, SHAPE, clip=clip)
    first.append(WHOLE[:7])
    os.pwrite(first._file, b"torn", os.fstat(first._file).st_size)
    first.close()
    again = GrowingFile(place, SHAPE, clip=clip)
    assert again.present == present
    again.append(WHOLE[present:])
    np.testing.assert_array_equal(np.load(place), WHOLE)


@pytest.mark.parametrize("written", [0, 5, 100])
def test_a_writer_interrupted_in_its_header_begins_anew(place, written):
    first = GrowingFile(place, SHAPE)
    os.truncate(first._file, written)
    first.close()
    again = GrowingFile(place, SHAPE)
    assert again.present == 0
    again.append(WHOLE)
    np.testing.assert_array_equal(np.load(place), WHOLE)


def test_a_file_whose_last_step_is_missing_is_finished(place):
    first = GrowingFile(place, SHAPE)
    first.append(WHOLE)
    first.close()
    place.rename(place.with_suffix(".part"))
    assert GrowingFile(place, SHAPE).present == 10
    np.testing.assert_array_equal(np.load(place), WHOLE)


def test_another_shape_begins_anew(place):
    GrowingFile(place, (10, 2, 4)).append(np.zeros((7, 2, 4), np.float16))
    assert GrowingFile(place, SHAPE).present == 0


def test_two_writers_are_an_error(place):
    first = GrowingFile(place, SHAPE)
    with pytest.raises(BlockingIOError, match="video.part is being written by another"):
        GrowingFile(place, SHAPE)
    first.close()
    assert GrowingFile(place, SHAPE).present == 0


def test_what_does_not_go_on_is_an_error(place):
    growing = GrowingFile(place, SHAPE)
    growing.append(WHOLE[:9])
    for wrong in (WHOLE[:2], WHOLE[:1, :1]):
        with pytest.raises(ValueError, match="of which 9 frames are there"):
            growing.append(wrong)
